"""What is reported of runs and measurements: their records, tables, markdown and pictures."""
