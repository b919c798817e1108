"""Sequential and permuted MNIST: images read pixel by pixel (Table 4 of the paper)."""
