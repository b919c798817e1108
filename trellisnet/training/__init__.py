"""Training: what is learned (tasks), how (engine), with which settings (config), what is kept (checkpoint, runlog)."""
