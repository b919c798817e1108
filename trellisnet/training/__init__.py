"""Training: what is learned (tasks), how (engine), with which settings (config), and what is kept (checkpoint, runlog)."""
