"""Sequential CIFAR-10: images read pixel by pixel (Table 4 of the paper)."""
