"""Places arrays on devices and coordinates processes; handles SIGTERM and the compilation cache."""
