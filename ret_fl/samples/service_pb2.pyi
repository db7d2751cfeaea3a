from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Compression(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NONE: _ClassVar[Compression]
    ZLIB: _ClassVar[Compression]
NONE: Compression
ZLIB: Compression

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Description(_message.Message):
    __slots__ = ("fingerprint", "samples", "channels", "height", "width", "num_classes", "kind")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    NUM_CLASSES_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    samples: int
    channels: int
    height: int
    width: int
    num_classes: int
    kind: str
    def __init__(self, fingerprint: _Optional[str] = ..., samples: _Optional[int] = ..., channels: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., num_classes: _Optional[int] = ..., kind: _Optional[str] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("grant", "signature", "ids", "compression")
    GRANT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    grant: bytes
    signature: bytes
    ids: bytes
    compression: Compression
    def __init__(self, grant: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., ids: _Optional[bytes] = ..., compression: _Optional[_Union[Compression, str]] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("records", "compression")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    records: bytes
    compression: Compression
    def __init__(self, records: _Optional[bytes] = ..., compression: _Optional[_Union[Compression, str]] = ...) -> None: ...
