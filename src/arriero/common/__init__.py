"""What every other part stands on: errors, files, text, devices. It imports nothing of arriero but itself."""
