package grpclimit

import (
	"bytes"
	"errors"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/structpb"
)

func read(b []byte, m proto.Message, elements int) error {
	return Codec(elements).Unmarshal(mem.BufferSlice{mem.SliceBuffer(b)}, m)
}

func TestCodec(t *testing.T) {
	files := &descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{
		{Dependency: []string{"a", "b"}, PublicDependency: []int32{1, 2, 3}, Options: &descriptorpb.FileOptions{}}, {},
	}}
	nested := structpb.NewNullValue()
	for range maxDepth {
		nested = structpb.NewListValue(&structpb.ListValue{Values: []*structpb.Value{nested}})
	}
	fields, err := structpb.NewStruct(map[string]any{"a": 1, "b": "two"})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name     string
		message  proto.Message
		elements int
		fits     bool
	}{
		{"lists, numbers of a list, and messages", files, 8, true},
		{"one more", files, 7, false},
		{"a map", fields, 4, true},
		{"a map with one more", fields, 3, false},
		{"too deep", nested, 1000, false},
	} {
		b, err := proto.Marshal(c.message)
		if err != nil {
			t.Fatal(err)
		}
		got := c.message.ProtoReflect().New().Interface()
		err = read(b, got, c.elements)
		if c.fits && (err != nil || !proto.Equal(got, c.message)) {
			t.Errorf("%s: %v, %v", c.name, err, got)
		}
		if !c.fits && !errors.Is(err, ErrLimit) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	// Packed numbers, and what ends too early.
	var packed []byte
	packed = protowire.AppendTag(packed, 10, protowire.BytesType)
	packed = protowire.AppendBytes(packed, bytes.Repeat([]byte{1}, 1000))
	if err := read(packed, new(descriptorpb.FileDescriptorProto), 999); !errors.Is(err, ErrLimit) {
		t.Errorf("1000 numbers: %v", err)
	}
	if err := read(packed[:100], new(descriptorpb.FileDescriptorProto), 1000); err == nil {
		t.Error("a message that is cut off is read")
	}
}

// FuzzCodec: what is within the limits is read as ever.
func FuzzCodec(f *testing.F) {
	b, err := proto.Marshal(&descriptorpb.FileDescriptorSet{
		File: []*descriptorpb.FileDescriptorProto{{Dependency: []string{"a"}, PublicDependency: []int32{1}}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, 10)
	f.Fuzz(func(t *testing.T, b []byte, elements int) {
		var got, want descriptorpb.FileDescriptorSet
		err, plain := read(b, &got, elements), proto.Unmarshal(b, &want)
		if errors.Is(err, ErrLimit) {
			return
		}
		if (err == nil) != (plain == nil) || err == nil && !proto.Equal(&got, &want) {
			t.Fatalf("%v, %v; without limits: %v, %v", err, &got, plain, &want)
		}
	})
}
