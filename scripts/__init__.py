"""Programs around the package, which measure, report and check it. README.md lists them."""
