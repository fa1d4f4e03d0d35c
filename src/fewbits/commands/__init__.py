"""What each command of `fewbits` does: `run(arguments) -> exit code`. Imported when used."""
