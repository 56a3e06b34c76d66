package pb

import (
	"slices"
	"testing"

	"github.com/bufbuild/protocompile"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"
)

const path = "p2p/rpc/pb/daemon.proto"

// TestGenerated fails where daemon.proto was edited and the Go files were not
// made anew: run make generate.
func TestGenerated(t *testing.T) {
	compiler := protocompile.Compiler{Resolver: &protocompile.SourceResolver{ImportPaths: []string{"../../.."}}}
	files, err := compiler.Compile(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	want, got := protodesc.ToFileDescriptorProto(files[0]), protodesc.ToFileDescriptorProto(
		File_p2p_rpc_pb_daemon_proto)
	for _, f := range []*descriptorpb.FileDescriptorProto{want, got} {
		f.SourceCodeInfo = nil
		for _, m := range f.MessageType {
			clearJSONNames(m)
		}
	}
	if !proto.Equal(want, got) {
		t.Errorf("daemon.pb.go is not made of daemon.proto: run make generate\nfrom %s:\n%v\nin Go:\n%v", path, want,
			got)
	}

	service := want.Service[0]
	if name := want.GetPackage() + "." + service.GetName(); Daemon_ServiceDesc.ServiceName != name {
		t.Errorf("the service is %s in Go, %s in %s", Daemon_ServiceDesc.ServiceName, name, path)
	}
	var unary, stream, wantUnary, wantStream []string
	for _, m := range Daemon_ServiceDesc.Methods {
		unary = append(unary, m.MethodName)
	}
	for _, s := range Daemon_ServiceDesc.Streams {
		stream = append(stream, direction(s.StreamName, s.ClientStreams, s.ServerStreams))
	}
	for _, m := range service.Method {
		if m.GetClientStreaming() || m.GetServerStreaming() {
			wantStream = append(wantStream, direction(m.GetName(), m.GetClientStreaming(), m.GetServerStreaming()))
		} else {
			wantUnary = append(wantUnary, m.GetName())
		}
	}
	if !slices.Equal(unary, wantUnary) || !slices.Equal(stream, wantStream) {
		t.Errorf("methods %v and %v in Go, %v and %v in %s", unary, stream, wantUnary, wantStream, path)
	}
}

func direction(name string, client, server bool) string {
	if client {
		name += " client"
	}
	if server {
		name += " server"
	}
	return name
}

// clearJSONNames removes what one compiler writes down and another leaves out.
func clearJSONNames(m *descriptorpb.DescriptorProto) {
	for _, f := range m.Field {
		f.JsonName = nil
	}
	for _, nested := range m.NestedType {
		clearJSONNames(nested)
	}
}
