"""An OpenAI-compatible server whose answers do not depend on other requests."""
