"""Word-level language modelling on WikiText-103 (Table 2 of the paper)."""
