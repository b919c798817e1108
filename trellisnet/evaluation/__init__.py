"""What is done with trained models: text is generated, and it is measured how far back they look."""
