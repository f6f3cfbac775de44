"""How fast this machine trains: `arriero bench`."""
