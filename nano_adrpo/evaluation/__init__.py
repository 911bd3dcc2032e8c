"""What a model is worth: the measurements of images and of text, tables over runs, pictures."""
