// Package pb holds the messages and the service of package rpc, made from
// daemon.proto by "make generate": protoc with the plugins protoc-gen-go and
// protoc-gen-go-grpc of the module integration/tools, run where go.mod is:
//
//	protoc -I . \
//		--go_out=. --go_opt=paths=source_relative \
//		--go-grpc_out=. --go-grpc_opt=paths=source_relative \
//		p2p/rpc/pb/daemon.proto
//
// It promises no compatibility.
package pb
