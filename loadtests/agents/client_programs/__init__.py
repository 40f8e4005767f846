"""Programs that let a client library work on a task. They run in .venv-clients and import nothing else of this project.

Each program takes a JSON file (see task.py), gives the task to the library's own agent loop, and records its calls.
"""
