"""The decisions of the runtime: pure functions. They must not use sockets, clocks or files.

================  =================================================================================
`plan`            `WorkflowPlan`: a workflow as data, without user code
`routing`         `Transition`: the messages and gathers that follow a stage
`coordination`    the transitions after a failed stage, a dead letter or a wait
`gather_results`  the bodies of gathers: branches, items, a request; `merge` merges contexts
`envelope`        the bodies of messages: `Envelope` and `Outcome`; `failures` encodes errors
`codec`           `ContextCodec`; `value_codec` for single values, `pydantic_codec` for models
`schema`          `ContextSchema`: the fields of a context type, for clients without the class
`roundtrip`       `RoundTripFault`: where a value changes by encoding and decoding; `advice` what to write instead
`extensions`      msgpack extensions for zones, `fold`, Decimals and more; `exact_types` finds subclasses
`input_digest`    recognises the input of a start again
`result`          `WorkflowResult`; `status` its states, `timeline` its entries
`description`     `InstanceDescription`: the state of an instance, live or finished
`resume_state`    the state from which a retry resumes the failed stage
`tracebacks`      the tracebacks of failed attempts, as text and as they travel
`invariants`      checks of the broker's audit; `outcome_check` of a stored outcome
`plural`          `pluralize`: a number with its noun, for messages
================  =================================================================================

This package may import `definition` and `errors` only.
"""
