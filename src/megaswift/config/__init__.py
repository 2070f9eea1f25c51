"""What a user may say: the options of every command, their parser, and files that hold them."""
