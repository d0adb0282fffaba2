"""What values are stored as in a payload, and what their annotations make of it.

Hides the traps of JSON, of jsonb and of dataclasses-json, and typing's many spellings of one type. What is written can
be stored as jsonb unchanged, and equals what was passed when it is read again; whatever cannot keep that promise is
refused, by its annotation when the job is declared, or by its value, with the path to it, when the job is enqueued.

Without an annotation that says otherwise a value is plain JSON:

- str, int (64 bits: from -2**63 to 2**64 - 1), float (finite), bool, None, list, and dict with str keys. Subclasses of
  str, int and float are stored as what they extend (numpy.float64, markupsafe.Markup); members of an Enum are refused.
- A tuple is stored as a list and comes back as one; OrderedDict, defaultdict and Counter come back as dict. Other
  subclasses of list, tuple and dict carry more than JSON would keep, and are refused.

These come back as themselves where they are annotated, also inside list, dict, tuple, set, X | None and dataclasses:

- datetime, date and time as ISO 8601 text. The offset of an aware datetime is kept; the name of its zone, and the fold
  of a naive one, are not.
- timedelta as a number of seconds; UUID and Decimal as text; an Enum as the value of the member.
- tuple, set and frozenset as a list; sets are sorted, so that equal ones are stored alike.
- float, also where an int was passed, or stored by another program: jsonb makes an integer of 1e16.
- a dataclass as the object of its fields, by dataclasses-json.

Annotations such as str, int or list[str] ask for no conversion and, as everywhere in Python, are not enforced.

Modules, from the top: annotations > dataclass_shape, scalars > shape > plain.
"""
