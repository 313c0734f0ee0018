"""From bytes to uint8 images, by library."""
