"""The definition of a workflow: immutable data, validated by its constructors.

================  =====================================================================
`workflow`        `Workflow`: the ordered steps over one type of context
`stage`           `Stage`, `Compensation`, `Replace`
`steps`           `Parallel`, `Branch`, `MapStage`, `Delay`, `Signal`
`decorator`       `@flow.stage` and `@handler.compensation`
`retry`           `Retry` and the interface `RetryPolicy`
`breaker`         `Breaker`
`handler`         `HandlerSpec`: how a handler is called
`guesses`         calls that do not fit a signature, and what is to be written instead
`class_options`   options that a class declares as attributes
`notebook`        definitions of notebook cells, which replace earlier ones
`callables`       checks of user functions that are not handlers
`services`        what `Runtime(services=...)` provides: values and factories
`parameters`      the parameters of user functions, through decorators and base classes
`http`, `remote`  handlers that send a request to a server or to an endpoint
`context_type`    which classes can be contexts; `type_hints` reads annotations
`kept_types`      types that can be kept between stages; `result_types` those of a workflow's results
`type_names`      names of classes in errors, with their module where two have the same name
`duration`        seconds as users write them; `ids` checks names
`pickling`        definitions as bytes for child processes
`mermaid`         the workflow as a flowchart
================  =====================================================================

This package must not import brokers, processes, clocks or the runtime.
"""
