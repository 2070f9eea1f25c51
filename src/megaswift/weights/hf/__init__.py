"""The Hugging Face side: finding model directories, reading them strictly, writing them whole or not at all."""
