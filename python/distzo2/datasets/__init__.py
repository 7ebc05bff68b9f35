"""Data sets as published become examples: the tasks that papers of this field report, and tasks of users."""
