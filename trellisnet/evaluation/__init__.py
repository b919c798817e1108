"""What is done with a trained language model beyond scoring it as it is."""
