"""Reports of runs and measurements: records, tables, markdown and pictures."""
