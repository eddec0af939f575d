"""The API contract of modelpress: messages, stubs, and the recipe language that they define."""
