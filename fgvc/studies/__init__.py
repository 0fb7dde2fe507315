"""One folder a question: what is measured, and how it is shown."""
