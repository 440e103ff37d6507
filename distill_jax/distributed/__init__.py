"""Where arrays and processes are: meshes and placement, agreement between processes, compiled programs, SIGTERM."""
