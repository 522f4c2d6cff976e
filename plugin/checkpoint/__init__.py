"""What a checkpoint on disk says: its configuration, its files, and whether its tensors bear both out.

=================  ============================================================================
module             what it answers
=================  ============================================================================
source             where the checkpoint is: a folder or a repository, asked for files by name
configuration      the GPTQ parameters, from ``config.json`` and ``quantize_config.json``
auto_round         AutoRound's parameters, where they describe GPTQ's tensors
json_files         what a JSON file says, or a named refusal
fields             what one parameter or file name says, or a named refusal
rules              which module the patterns of ``dynamic`` match, in bounded time
automaton          whether one such pattern matches a name
weight_files       which files hold the weights
headers            which tensors these hold, of which shape and dtype
validation         from the headers of one projection to its ``QuantSpec``, or a named refusal
values             whether its values bear that out
padding            whether what the model has no place for is zero
unread             what a checkpoint holds and nothing would read
projections        the same for every projection of a checkpoint, without a model
inspection         all of the above for ``graftq inspect``
oddities           what is unusual, and has made other loaders fail
=================  ============================================================================

Importing this package imports neither torch nor a framework; values are read on demand.
"""
