"""The API contract of modelpress: messages, stubs, the recipe language, and the table of formats."""
