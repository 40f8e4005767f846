"""The console in the browser: its pages, sessions, sign-in, and its access to the admin API and the OpenAI API."""
