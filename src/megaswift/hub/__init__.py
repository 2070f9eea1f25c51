"""Where models come from: a local folder, the hubs, a packaged file."""
