"""Programs beside the package: they measure, report and check it. README.md lists them."""
