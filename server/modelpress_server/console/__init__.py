"""The read-only console: projects, the queue, jobs, reports and comparisons as pages (`--console`).

    app         routes, the headers of every answer, errors as pages
    sessions    signing in and out: a cookie stands for a token
    visitor     what the API answers to whoever looks: the console has no way of its own to the stores
    pages       what each page shows
    live        the progress of a job as server-sent events
    candidates  the candidates of a report as a plot
    figures     figures and times for people

Everything is rendered here, with what strangers named (labels, models, nodes) escaped by Jinja2 and made printable. A
Content-Security-Policy allows the console's own style and its one script, which brings progress to an open page, and
nothing from elsewhere. Nothing can be changed here.
"""
