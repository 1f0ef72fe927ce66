"""Running a model step by step; models come as callables."""
