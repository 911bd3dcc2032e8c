"""How good a model is: the measurements of images and of text, tables over runs, pictures."""
