// Package grpclimit reads protobuf messages that come from outside by gRPC. What one holds is
// counted before anything is made of it: two bytes, an empty message in a list, can become
// hundreds in memory.
//
// It promises no compatibility.
package grpclimit

import (
	"errors"
	"fmt"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	_ "google.golang.org/grpc/encoding/proto" // what the codec writes with
)

// maxDepth is how deep messages may stand in each other.
const maxDepth = 32

// ErrLimit is what the error of a message matches that holds too much.
var ErrLimit = errors.New("too much in a message")

// codec is gRPC's own for protobuf, with limits on what it reads.
type codec struct {
	encoding.CodecV2
	elements int
}

// Codec returns gRPC's codec for protobuf, for messages from outside of at most so many
// elements: messages in a message, and entries of its lists and maps. One that has more, or is deeper
// than 32 levels, fails with an error that matches [ErrLimit], which ends its call. Bytes are for gRPC's own limit.
func Codec(elements int) encoding.CodecV2 {
	return codec{encoding.GetCodecV2("proto"), elements}
}

// Unmarshal implements [encoding.CodecV2].
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(proto.Message)
	if !ok {
		return fmt.Errorf("a %T is no protobuf message", v)
	}
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	if err := Check(m, buf.ReadOnlyData(), c.elements); err != nil {
		return err
	}
	return proto.Unmarshal(buf.ReadOnlyData(), m)
}

// Check fails where b, which is to become a message like m, has more than so many elements,
// as [Codec] counts them, or is too deep.
func Check(m proto.Message, b []byte, elements int) error {
	return check(m.ProtoReflect().Descriptor(), b, &elements, maxDepth)
}

// check takes the elements of a message off left.
func check(md protoreflect.MessageDescriptor, b []byte, left *int, depth int) error {
	if depth == 0 {
		return fmt.Errorf("%w: it is more than %d levels deep", ErrLimit, maxDepth)
	}
	for len(b) > 0 {
		number, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if n = protowire.ConsumeFieldValue(number, typ, b); n < 0 {
			return protowire.ParseError(n)
		}
		value := b[:n]
		b = b[n:]
		fd := md.Fields().ByNumber(number)
		if fd == nil {
			continue // it is kept as it is
		}
		if typ == protowire.BytesType {
			value, _ = protowire.ConsumeBytes(value)
		} else if typ == protowire.StartGroupType {
			value, _ = protowire.ConsumeGroup(number, value)
		}
		inner := fd.Message()
		switch {
		case inner != nil || fd.IsList() && !packed(fd, typ):
			*left--
		case fd.IsList():
			*left -= numbers(fd.Kind(), value)
		}
		if *left < 0 {
			return fmt.Errorf("%w: a %s has too many elements", ErrLimit, md.FullName())
		}
		if inner != nil && (typ == protowire.BytesType || typ == protowire.StartGroupType) {
			if err := check(inner, value, left, depth-1); err != nil {
				return err
			}
		}
	}
	return nil
}

// packed reports whether a field of a list has many numbers in a row.
func packed(fd protoreflect.FieldDescriptor, typ protowire.Type) bool {
	return typ == protowire.BytesType && fd.Kind() != protoreflect.StringKind && fd.Kind() != protoreflect.BytesKind
}

// numbers returns how many numbers are in a row. Those of a fixed length take no more
// in memory than in a message, and are not counted.
func numbers(kind protoreflect.Kind, b []byte) (n int) {
	switch kind {
	case protoreflect.Fixed32Kind, protoreflect.Sfixed32Kind, protoreflect.FloatKind,
		protoreflect.Fixed64Kind, protoreflect.Sfixed64Kind, protoreflect.DoubleKind:
		return 0
	}
	for _, c := range b {
		if c < 0x80 {
			n++ // the last byte of one
		}
	}
	return n
}
