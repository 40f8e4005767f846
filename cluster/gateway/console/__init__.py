"""The console in the browser: its pages, its sign-in and sessions, and its access to the admin API and the OpenAI
API.
"""
