"""What a model is rewarded for: functions of what it writes, the process that runs them, and their objective."""
