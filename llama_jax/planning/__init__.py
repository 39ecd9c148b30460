"""Planning a run without its machine: compile it, count what was compiled, say what it costs."""
