package rpc

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/rpc/pb"
)

// FuzzRequests decodes bytes as each request, and checks it: no panic, every
// refusal is ErrInvalid, and what passes is what the engine's contract allows.
func FuzzRequests(f *testing.F) {
	task := taskMessage(someTask)
	for _, m := range []proto.Message{
		&pb.ResolveRequest{Tag: "models", Cid: "v1", Scope: pb.Scope_SCOPE_LOCAL},
		&pb.StatRequest{Task: task, Scope: pb.Scope_SCOPE_NETWORK},
		&pb.OpenRequest{Task: task, Scope: pb.Scope_SCOPE_NETWORK, DescriptorId: 7},
		&pb.DeleteRequest{Cid: task.Digest, Force: true},
		&pb.ListRequest{Tag: new(string)},
		addRequest(1, 5),
		&pb.IngestRequest{Request: &pb.IngestRequest_Commit_{Commit: &pb.IngestRequest_Commit{
			Tasks: []*pb.NewTask{{Task: task, MediaType: "text/plain", Refs: []string{task.Digest}}},
			Names: []*pb.NewName{{Tag: "models", Name: "v1", Digest: task.Digest}},
		}}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		check := func(err error, valid func() error) {
			t.Helper()
			if err == nil {
				err = valid()
				if err != nil {
					t.Errorf("passed, but %v", err)
				}
			} else if !errors.Is(err, digest.ErrInvalid) {
				t.Errorf("%v is not ErrInvalid", err)
			}
		}
		var resolve pb.ResolveRequest
		if proto.Unmarshal(b, &resolve) == nil {
			cid, _, err := parseResolve(&resolve)
			check(err, func() error {
				_, err := digest.ParseCID(cid.String())
				return errors.Join(err, p2p.ValidateTag(resolve.Tag))
			})
		}
		var stat pb.StatRequest
		if proto.Unmarshal(b, &stat) == nil {
			task, _, err := parseStat(&stat)
			check(err, task.Validate)
		}
		var open pb.OpenRequest
		if proto.Unmarshal(b, &open) == nil {
			task, _, err := parseOpen(&open)
			check(err, task.Validate)
		}
		var del pb.DeleteRequest
		if proto.Unmarshal(b, &del) == nil {
			cid, err := parseDelete(&del)
			check(err, func() error { _, err := digest.ParseCID(cid.String()); return err })
		}
		var list pb.ListRequest
		if proto.Unmarshal(b, &list) == nil {
			tag, err := parseList(&list)
			check(err, func() error {
				if tag == nil {
					return nil
				}
				return p2p.ValidateTag(*tag)
			})
		}
		var ingest pb.IngestRequest
		if proto.Unmarshal(b, &ingest) == nil {
			_, err := parseAdd(ingest.GetAdd())
			check(err, func() error { return nil })
			var parser commitParser
			check(parser.add(ingest.GetCommit()), func() (err error) {
				for _, task := range parser.commit.Tasks {
					err = errors.Join(err, task.Task.Validate())
				}
				return err
			})
		}
		// What a daemon answers.
		var reply pb.OpenReply
		if proto.Unmarshal(b, &reply) == nil {
			var parser tableParser
			if parser.add(someTask.Digest, &reply) == nil && reply.Sent && len(parser.table.CRC) != parser.table.Pieces() {
				t.Error("a table that is not whole passed")
			}
		}
		var entry pb.Info
		if proto.Unmarshal(b, &entry) == nil {
			infoOf(&entry)
		}
	})
}

// FuzzPreface reads bytes as what the other side sends first: it takes exactly
// our preface, and never a byte of what follows it.
func FuzzPreface(f *testing.F) {
	for _, s := range []string{"", "dfcache/1\n", "dfcache/1\nPRI * HTTP/2.0", "dfcache/2\n", "dfcache/1234567\nrest", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "dfcache/" + strings.Repeat("9", 100)} {
		f.Add([]byte(s), 3)
	}
	f.Fuzz(func(t *testing.T, b []byte, chunk int) {
		r := bytes.NewReader(b)
		err := readPreface(chunked{r, max(chunk, 1)})
		ours := bytes.HasPrefix(b, preface)
		if (err == nil) != ours {
			t.Fatalf("%q: %v", b, err)
		}
		if read := len(b) - r.Len(); ours && read != len(preface) || read > maxPreface {
			t.Fatalf("%q: %d bytes read", b, read)
		}
		if (err == io.EOF) != (len(b) == 0) {
			t.Fatalf("%q: %v", b, err)
		}
	})
}

// chunked reads at most n bytes at once.
type chunked struct {
	r io.Reader
	n int
}

func (c chunked) Read(p []byte) (int, error) { return c.r.Read(p[:min(c.n, len(p))]) }

// FuzzChannelMessage decodes what comes from the descriptor channel.
func FuzzChannelMessage(f *testing.F) {
	id := binary.BigEndian.AppendUint64(nil, 7)
	f.Add(id, unix.UnixRights(5), 0)
	f.Add(id, unix.UnixRights(5, 6, 7), unix.MSG_CTRUNC)
	f.Add(id[:3], []byte{}, 0)
	f.Add([]byte{}, []byte{1, 2, 3}, 0)
	f.Fuzz(func(t *testing.T, b, oob []byte, flags int) {
		got, err := parseID(b)
		if (err == nil) != (len(b) == idSize) || err == nil && !bytes.Equal(binary.BigEndian.AppendUint64(nil, got), b) {
			t.Errorf("%x: %d, %v", b, got, err)
		}
		fds, err := parseRights(oob, flags)
		if err == nil && flags&unix.MSG_CTRUNC != 0 {
			t.Error("a message that was cut passed")
		}
		if 4*len(fds) > len(oob) {
			t.Errorf("%d descriptors from %d bytes", len(fds), len(oob))
		}
	})
}

func TestParseRights(t *testing.T) {
	for _, want := range [][]int{nil, {5}, {5, 6}} {
		var oob []byte
		if want != nil {
			oob = unix.UnixRights(want...)
		}
		if got, err := parseRights(oob, 0); err != nil || !slices.Equal(got, want) {
			t.Errorf("got %v, %v; want %v", got, err, want)
		}
	}
}

func TestValidate(t *testing.T) {
	task := taskMessage(someTask)
	d := task.Digest
	commit := func(c *pb.IngestRequest_Commit) error { return new(commitParser).add(c) }
	newTask := func(n *pb.NewTask) error {
		n.Task = task
		return commit(&pb.IngestRequest_Commit{Tasks: []*pb.NewTask{n}})
	}
	newName := func(n *pb.NewName) error { return commit(&pb.IngestRequest_Commit{Names: []*pb.NewName{n}}) }
	stat := func(r *pb.StatRequest) error { _, _, err := parseStat(r); return err }
	add := func(r *pb.IngestRequest_Add) error { _, err := parseAdd(r); return err }
	for name, test := range map[string]struct {
		err  error
		text string // "" where it is valid
	}{
		"scope missing":       {stat(&pb.StatRequest{Task: task}), "scope 0"},
		"scope unknown":       {stat(&pb.StatRequest{Task: task, Scope: 9}), "scope 9"},
		"task missing":        {stat(&pb.StatRequest{Scope: pb.Scope_SCOPE_LOCAL}), "digest"},
		"stat":                {stat(&pb.StatRequest{Task: task, Scope: pb.Scope_SCOPE_LOCAL}), ""},
		"offset":              {add(&pb.IngestRequest_Add{Offset: -1}), "negative"},
		"want":                {add(&pb.IngestRequest_Add{Want: "md5:00"}), "unknown algorithm"},
		"algorithm":           {add(&pb.IngestRequest_Add{Algorithm: "md5"}), "unknown algorithm"},
		"add":                 {add(&pb.IngestRequest_Add{Want: d, Algorithm: "sha512"}), ""},
		"media type":          {newTask(&pb.NewTask{MediaType: strings.Repeat("x", 255)}), ""},
		"long media type":     {newTask(&pb.NewTask{MediaType: strings.Repeat("x", 256)}), "256 characters"},
		"media type with LF":  {newTask(&pb.NewTask{MediaType: "a\nb"}), "printable"},
		"media type with é":   {newTask(&pb.NewTask{MediaType: "é"}), "printable"},
		"refs":                {newTask(&pb.NewTask{Refs: slices.Repeat([]string{d}, maxRefs)}), ""},
		"many refs":           {newTask(&pb.NewTask{Refs: slices.Repeat([]string{d}, maxRefs+1)}), "10001"},
		"ref":                 {newTask(&pb.NewTask{Refs: []string{"v1"}}), "digest"},
		"name":                {newName(&pb.NewName{Name: "v1", Digest: d}), ""},
		"name without digest": {newName(&pb.NewName{Name: "v1"}), "digest"},
		"name is a digest":    {newName(&pb.NewName{Name: d, Digest: d}), "can't be the name"},
		"name is not one":     {newName(&pb.NewName{Name: "-", Digest: d}), "cache ID"},
		"tag of a name":       {newName(&pb.NewName{Tag: "X", Name: "v1", Digest: d}), "tag"},
	} {
		if test.text == "" {
			if test.err != nil {
				t.Errorf("%s: %v", name, test.err)
			}
		} else if !errors.Is(test.err, digest.ErrInvalid) || !strings.Contains(test.err.Error(), test.text) {
			t.Errorf("%s: %v, want %q in it", name, test.err, test.text)
		}
	}

	// All parts of a commit together.
	part := &pb.IngestRequest_Commit{Tasks: []*pb.NewTask{{Task: task, Refs: slices.Repeat([]string{d}, maxRefs)}}}
	var parser commitParser
	var err error
	for n := 0; err == nil; n += proto.Size(part) {
		if n > maxCommit {
			t.Fatal("a commit has no bound")
		}
		err = parser.add(part)
	}
	if !errors.Is(err, digest.ErrInvalid) {
		t.Errorf("got %v", err)
	}
}

func TestTableMessages(t *testing.T) {
	for _, pieces := range []int{0, 1, maxChecksums, maxChecksums + 1, 3*maxChecksums - 1} {
		table := &digest.Table{Digest: someTask.Digest, Size: int64(pieces) * digest.MaxPieceLength}
		if pieces == 1 {
			table.Size = 1
		}
		table.PieceLength = digest.PieceLength(table.Size)
		for i := range pieces {
			table.CRC = append(table.CRC, uint32(i*i))
		}
		messages := openMessages(table)
		if want := max(1, (pieces+maxChecksums-1)/maxChecksums); len(messages) != want {
			t.Errorf("%d pieces: %d messages, want %d", pieces, len(messages), want)
		}
		var parser tableParser
		for i, m := range messages {
			b, err := proto.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			var got pb.OpenReply
			if err := proto.Unmarshal(b, &got); err != nil {
				t.Fatal(err)
			}
			if err := parser.add(table.Digest, &got); err != nil {
				t.Fatal(err)
			}
			if got.Sent != (i == len(messages)-1) {
				t.Errorf("message %d of %d: sent is %t", i, len(messages), got.Sent)
			}
		}
		if parser.table.Size != table.Size || parser.table.PieceLength != table.PieceLength || !slices.Equal(parser.table.CRC, table.CRC) {
			t.Errorf("%d pieces: the table differs", pieces)
		}
	}
}

func TestBadTableMessages(t *testing.T) {
	header := &pb.OpenReply_Header{Size: 100, PieceLength: digest.MinPieceLength}
	for name, messages := range map[string][]*pb.OpenReply{
		"no header":          {{Sent: true}},
		"checksums first":    {{Crc32C: []uint32{1}}},
		"two headers":        {{Header: header}, {Header: header}},
		"negative size":      {{Header: &pb.OpenReply_Header{Size: -1, PieceLength: digest.MinPieceLength}}},
		"piece length":       {{Header: &pb.OpenReply_Header{Size: 100, PieceLength: 0}}},
		"too few checksums":  {{Header: header, Sent: true}},
		"too many checksums": {{Header: header, Crc32C: []uint32{1, 2}}},
	} {
		var parser tableParser
		var err error
		for _, m := range messages {
			err = errors.Join(err, parser.add(someTask.Digest, m))
		}
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	// What a later version may send before the header.
	if err := new(tableParser).add(someTask.Digest, &pb.OpenReply{}); err != nil {
		t.Error(err)
	}
}
