"""An OpenAI-compatible HTTP server over :class:`cats.Sessions`; it needs the extra ``serve``."""
