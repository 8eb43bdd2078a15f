"""The input of `stageflow run`: from bytes to contexts.

=================  =================================================================================
`source`           the bytes of a file or of stdin, decompressed, with a look at the first ones
`layout`           recognises how the records are written: JSON lines, a JSON array, rows of cells
`other_kinds`      names the kinds of files that are not read
`delimiters`       the delimiter of rows
`physical_lines`   splits bytes into lines of bounded length
`json_text`        one JSON object as a context, or the reason why it is none
`json_elements`    the elements of a JSON array, or objects one after the other, in bounded memory
`cell_rows`        the rows of a CSV or TSV file
=================  =================================================================================

`stageflow_actors.cli.input_file` puts them together.
"""
