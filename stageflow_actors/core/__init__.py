"""The decisions of the runtime: pure functions without sockets, clocks or files.

================  =================================================================================
`plan`            a workflow as data: stages, queues, limits, without user code
`routing`         which messages follow a stage
`coordination`    which messages follow a failed stage or a dead letter
`gather_results`  the bodies of a gather: branches, items, a reply; `merge` merges contexts
`envelope`        the bodies of messages: envelope and outcome; `failures` encodes errors
`codec`           contexts as msgpack; `value_codec` for single values, `pydantic_codec` for models
`schema`          the fields of a context type, for clients that do not have the class
`roundtrip`       where a value changes by encoding and decoding, in words
`result`          `WorkflowResult`; `status` its states, `timeline` its history
`description`     the state of an instance, from the broker or from its outcome
`resume_state`    the point from which a retry continues
`invariants`      checks of an audit of the broker; `outcome_check` those of an outcome
`plural`          counted nouns in messages
================  =================================================================================

This package may import `definition` and `errors` only.
"""
