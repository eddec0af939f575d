"""Who calls, and what they may do.

roles           reader, submitter, admin of a project; what each method needs
tokens          static tokens: the settings' and a file's, and those that `compress-server token` keeps, hashed
jwt             JSON web tokens of an OpenID provider
throttle        callers with wrong tokens are slowed down
authenticator   all of it: an authorization header becomes a Caller
audit           a line for each call that changes something, or was refused
"""
