"""Webhooks: places that the operator names are told when jobs end.

    endpoints   who is told of what (`--webhooks`)
    message     an end of a job as a CloudEvent, and its signature as of Standard Webhooks
    delivery    one attempt over HTTP
    dispatcher  attempts until each event has arrived

An event is stored in the transaction that ends its job (`stores.sql_outbox`), and forgotten when it has arrived: at
least once, whatever is killed in between.
"""
