package rpc

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
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
	task, info := taskMessage(someTask), infoMessage(p2p.Info{Task: someTask})
	for _, m := range []proto.Message{
		&pb.StatRequest{Tag: "models", Cid: "v1", Scope: pb.Scope_SCOPE_LOCAL, Manifest: true},
		&pb.StatRequest{Cid: "v1", Scope: pb.Scope_SCOPE_NETWORK, Manifest: true, Holders: true},
		&pb.OpenRequest{Task: task, Scope: pb.Scope_SCOPE_NETWORK, DescriptorId: 7},
		&pb.OpenRequest{Want: &pb.OpenRequest_Want{First: 1, Last: 3}},
		&pb.OpenReply{Header: &pb.OpenReply_Header{Size: 100, PieceLength: digest.MinPieceLength, Arriving: true},
			Sent: true},
		&pb.OpenReply{Pieces: []*pb.OpenReply_Piece{{Index: 1, Crc32C: 7}},
			Done: &pb.OpenReply_Done{Sources: []*pb.Source{{Peer: "p", Address: "a", Bytes: 7}}}},
		&pb.ReplicateRequest{Tag: "models", Cid: "v1", N: 2},
		&pb.PeersReply{Peers: []*pb.Peer{
			{Id: "p", Addresses: []string{"a"}, State: pb.PeerState_PEER_STATE_AWAY, LatencyNano: 7}}},
		&pb.DeleteReply{Tasks: 1, Reached: 2, Removed: 1,
			Missed: []*pb.DeleteReply_Missed{{Peer: "p", Reason: "away"}}},
		&pb.DeleteRequest{Cid: task.Digest, Force: true},
		&pb.DeleteRequest{Tag: "models", Cid: "v1", NameOnly: true},
		&pb.ListRequest{Tag: new(string), Kind: pb.Kind_KIND_ALL, RefersTo: task.Digest},
		&pb.ListRequest{Kind: pb.Kind_KIND_TAGS, After: []byte("models")},
		addRequest(1, 5),
		&pb.IngestRequest{Request: &pb.IngestRequest_Rehash_{
			Rehash: &pb.IngestRequest_Rehash{Digest: task.Digest, Want: task.Digest}}},
		&pb.IngestRequest{Request: &pb.IngestRequest_Commit_{Commit: &pb.IngestRequest_Commit{
			Tasks: []*pb.NewTask{{
				Task: task, MediaType: "text/plain", Keep: pb.Keep_KEEP_PINNED, OriginUnixNano: 7,
				Manifest: &pb.NewTask_Manifest{
					Refs: []string{task.Digest}, Needs: []string{task.Digest}, Subject: task.Digest},
			}},
			Names: []*pb.NewName{{Tag: "models", Name: "v1", Digest: task.Digest, KeepOld: true, UpdatedUnixNano: 7}},
		}}},
		&pb.StatReply{Info: info, Holders: &pb.Holders{Some: 1, Asked: 2},
			Manifest: &pb.StatReply_Manifest{Content: []byte("{}"), Refs: []*pb.Info{info}}},
		&pb.Entry{Info: info, Name: "v1", Total: 7},
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
		validDigest := func(d digest.Digest) error { _, err := digest.Parse(string(d)); return err }
		var stat pb.StatRequest
		if proto.Unmarshal(b, &stat) == nil {
			cid, opts, err := parseStat(&stat)
			check(err, func() error {
				if opts.Scope != p2p.Network && opts.Providers {
					return fmt.Errorf("%+v", opts)
				}
				_, err := digest.ParseCID(cid.String())
				return errors.Join(err, p2p.ValidateTag(stat.Tag))
			})
		}
		var open pb.OpenRequest
		if proto.Unmarshal(b, &open) == nil {
			task, _, err := parseOpen(&open)
			check(err, task.Validate)
			first, last, err := parseWant(&open, 4)
			check(err, func() error {
				if first < 0 || last < first || last > 3 {
					return fmt.Errorf("pieces %d to %d of 4", first, last)
				}
				return nil
			})
		}
		var replicate pb.ReplicateRequest
		if proto.Unmarshal(b, &replicate) == nil {
			cid, n, err := parseReplicate(&replicate)
			check(err, func() error {
				if n < 0 || n > maxReplicas {
					return fmt.Errorf("%d peers", n)
				}
				_, err := digest.ParseCID(cid.String())
				return err
			})
		}
		var del pb.DeleteRequest
		if proto.Unmarshal(b, &del) == nil {
			cid, opts, err := parseDelete(&del)
			check(err, func() error {
				if opts.NameOnly && (cid.CacheID() == "" || opts.Force) {
					return fmt.Errorf("%+v of %s", opts, cid)
				}
				_, err := digest.ParseCID(cid.String())
				return err
			})
		}
		var list pb.ListRequest
		if proto.Unmarshal(b, &list) == nil {
			q, err := parseList(&list)
			check(err, func() (err error) {
				if q.Tag != nil {
					err = p2p.ValidateTag(*q.Tag)
				}
				if q.RefersTo != "" {
					err = errors.Join(err, validDigest(q.RefersTo))
				}
				if q.Has != "" {
					err = errors.Join(err, validDigest(q.Has))
				}
				if len(q.After) > p2p.MaxTag || q.RefersTo != "" && (q.Tag == nil || q.Kind != p2p.KindAll) ||
					q.Has != "" && q.Kind != p2p.KindTags {
					err = fmt.Errorf("%+v", q)
				}
				return err
			})
		}
		var ingest pb.IngestRequest
		if proto.Unmarshal(b, &ingest) == nil {
			_, err := parseAdd(ingest.GetAdd())
			check(err, func() error { return nil })
			d, want, err := parseRehash(ingest.GetRehash())
			check(err, func() error { return errors.Join(validDigest(d), validDigest(want)) })
			var parser commitParser
			check(parser.add(ingest.GetCommit()), func() (err error) {
				for _, task := range parser.commit.Tasks {
					err = errors.Join(err, task.Task.Validate())
					if task.Manifest == nil {
						continue
					}
					for _, d := range task.Manifest.Refs {
						err = errors.Join(err, validDigest(d))
					}
					for _, d := range task.Manifest.Needs {
						if !slices.Contains(task.Manifest.Refs, d) {
							err = errors.Join(err, fmt.Errorf("%s is not among the refs", d))
						}
					}
					if task.Manifest.Subject != "" {
						err = errors.Join(err, validDigest(task.Manifest.Subject))
					}
				}
				return err
			})
		}
		// What a daemon answers.
		var reply pb.OpenReply
		if proto.Unmarshal(b, &reply) == nil {
			var parser tableParser
			if parser.add(someTask.Digest, &reply) == nil && reply.Sent &&
				len(parser.table.CRC) != parser.table.Pieces() {
				t.Error("a table that is not whole passed")
			}
			d := newDownload(&digest.Table{
				Size: 4 * digest.MinPieceLength, PieceLength: digest.MinPieceLength, CRC: make([]uint32, 4)}, nil)
			if whole, err := d.add(&reply); err == nil && whole != (reply.Done != nil) || whole && d.missing != 0 {
				t.Errorf("whole is %t, %d pieces are missing", whole, d.missing)
			}
		}
		answer := func(err error) {
			if errors.Is(err, digest.ErrInvalid) {
				t.Errorf("%v is an error of the caller", err)
			}
		}
		var described pb.StatReply
		if proto.Unmarshal(b, &described) == nil {
			_, err := statOf(&described)
			answer(err)
		}
		var deleted pb.DeleteReply
		if proto.Unmarshal(b, &deleted) == nil {
			_, err := deletedOf(&deleted)
			answer(err)
		}
		var peers pb.PeersReply
		if proto.Unmarshal(b, &peers) == nil {
			for _, p := range peers.Peers {
				_, err := parsePeer(p)
				answer(err)
			}
		}
		var entry pb.Entry
		if proto.Unmarshal(b, &entry) == nil {
			for _, kind := range listKinds {
				_, err := entryOf(&entry, kind)
				answer(err)
			}
		}
	})
}

// FuzzPreface reads bytes as what the other side sends first: it takes exactly
// our preface, and never a byte of what follows it.
func FuzzPreface(f *testing.F) {
	for _, s := range []string{"", "dfcache/1\n", "dfcache/1\nPRI * HTTP/2.0", "dfcache/2\n", "dfcache/1234567\nrest",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "dfcache/" + strings.Repeat("9", 100)} {
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
		if (err == nil) != (len(b) == idSize) ||
			err == nil && !bytes.Equal(binary.BigEndian.AppendUint64(nil, got), b) {
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
	ref := digest.SHA256.FromString("ref").String()
	d, other := task.Digest, string(digest.SHA512.FromString("other"))
	commit := func(c *pb.IngestRequest_Commit) error { return new(commitParser).add(c) }
	newTask := func(n *pb.NewTask) error {
		n.Task = task
		return commit(&pb.IngestRequest_Commit{Tasks: []*pb.NewTask{n}})
	}
	typed := func(s string) error { return newTask(&pb.NewTask{MediaType: s, Keep: pb.Keep_KEEP_HELD}) }
	manifest := func(m *pb.NewTask_Manifest) error {
		return newTask(&pb.NewTask{Keep: pb.Keep_KEEP_HELD, Manifest: m})
	}
	newName := func(n *pb.NewName) error { return commit(&pb.IngestRequest_Commit{Names: []*pb.NewName{n}}) }
	stat := func(r *pb.StatRequest) error { _, _, err := parseStat(r); return err }
	open := func(r *pb.OpenRequest) error { _, _, err := parseOpen(r); return err }
	del := func(r *pb.DeleteRequest) error { _, _, err := parseDelete(r); return err }
	list := func(r *pb.ListRequest) error { _, err := parseList(r); return err }
	add := func(r *pb.IngestRequest_Add) error { _, err := parseAdd(r); return err }
	rehash := func(r *pb.IngestRequest_Rehash) error { _, _, err := parseRehash(r); return err }
	want := func(r *pb.OpenRequest) error { _, _, err := parseWant(r, 4); return err }
	replicate := func(r *pb.ReplicateRequest) error { _, _, err := parseReplicate(r); return err }
	const network = pb.Scope_SCOPE_NETWORK
	const local, all, names = pb.Scope_SCOPE_LOCAL, pb.Kind_KIND_ALL, pb.Kind_KIND_NAMES
	for name, test := range map[string]struct {
		err  error
		text string // "" where it is valid
	}{
		"scope missing":  {stat(&pb.StatRequest{Cid: d}), "scope 0"},
		"scope unknown":  {stat(&pb.StatRequest{Cid: d, Scope: 9}), "scope 9"},
		"cid missing":    {stat(&pb.StatRequest{Scope: local}), "cid"},
		"tag of a stat":  {stat(&pb.StatRequest{Tag: "X", Cid: d, Scope: local}), "tag"},
		"stat":           {stat(&pb.StatRequest{Cid: d, Scope: local}), ""},
		"holders":        {stat(&pb.StatRequest{Cid: d, Scope: network, Holders: true}), ""},
		"holders, local": {stat(&pb.StatRequest{Cid: d, Scope: local, Holders: true}), "network"},
		"want pieces":    {want(&pb.OpenRequest{Want: &pb.OpenRequest_Want{First: 1, Last: 3}}), ""},
		"want of one":    {want(&pb.OpenRequest{Want: &pb.OpenRequest_Want{First: 3, Last: 3}}), ""},
		"want past the end": {want(&pb.OpenRequest{Want: &pb.OpenRequest_Want{First: 3, Last: 4}}),
			"the blob has 4"},
		"want backwards": {want(&pb.OpenRequest{Want: &pb.OpenRequest_Want{First: 2, Last: 1}}),
			"pieces 2 to 1"},
		"want at first": {open(&pb.OpenRequest{Task: task, Scope: local, Want: &pb.OpenRequest_Want{}}),
			"when it is open"},
		"open again":            {want(&pb.OpenRequest{Task: task, Want: &pb.OpenRequest_Want{}}), "first request"},
		"want nothing":          {want(&pb.OpenRequest{}), "first request"},
		"replicate":             {replicate(&pb.ReplicateRequest{Cid: "v1", N: 3}), ""},
		"replicate to -1":       {replicate(&pb.ReplicateRequest{Cid: "v1", N: -1}), "-1 peers"},
		"replicate to all":      {replicate(&pb.ReplicateRequest{Cid: "v1", N: maxReplicas + 1}), "1048577 peers"},
		"replicate nothing":     {replicate(&pb.ReplicateRequest{N: 1}), "cid"},
		"replicate under a tag": {replicate(&pb.ReplicateRequest{Tag: "X", Cid: "v1"}), "tag"},
		"origin":                {newTask(&pb.NewTask{Keep: pb.Keep_KEEP_HELD, OriginUnixNano: 1}), ""},
		"origin before 1970":    {newTask(&pb.NewTask{Keep: pb.Keep_KEEP_HELD, OriginUnixNano: -1}), "1970"},
		"name before 1970":      {newName(&pb.NewName{Name: "v1", Digest: d, UpdatedUnixNano: -1}), "1970"},
		"task missing":          {open(&pb.OpenRequest{Scope: local}), "digest"},
		"open without a scope":  {open(&pb.OpenRequest{Task: task}), "scope 0"},
		"open":                  {open(&pb.OpenRequest{Task: task, Scope: local}), ""},
		"delete":                {del(&pb.DeleteRequest{Cid: d, Force: true}), ""},
		"delete a name":         {del(&pb.DeleteRequest{Cid: "v1", NameOnly: true}), ""},
		"name only of a digest": {del(&pb.DeleteRequest{Cid: d, NameOnly: true}), "not a name"},
		"name only by force":    {del(&pb.DeleteRequest{Cid: "v1", NameOnly: true, Force: true}), "force"},
		"list":                  {list(&pb.ListRequest{Kind: all}), ""},
		"tag of a list":         {list(&pb.ListRequest{Tag: proto.String("X"), Kind: all}), "tag"},
		"kind missing":          {list(&pb.ListRequest{}), "kind 0"},
		"kind unknown":          {list(&pb.ListRequest{Kind: 5}), "kind 5"},
		"after":                 {list(&pb.ListRequest{Kind: names, After: make([]byte, 255)}), ""},
		"long after":            {list(&pb.ListRequest{Kind: names, After: make([]byte, 256)}), "256"},
		"refers to":             {list(&pb.ListRequest{Tag: &task.Tag, Kind: all, RefersTo: d}), ""},
		"refers to, no tag":     {list(&pb.ListRequest{Kind: all, RefersTo: d}), "with a tag"},
		"refers to, names":      {list(&pb.ListRequest{Tag: &task.Tag, Kind: names, RefersTo: d}), "kind"},
		"holds":                 {list(&pb.ListRequest{Kind: pb.Kind_KIND_TAGS, Has: d}), ""},
		"holds, names":          {list(&pb.ListRequest{Kind: names, Has: d}), "kind"},
		"holds a name":          {list(&pb.ListRequest{Kind: pb.Kind_KIND_TAGS, Has: "v1"}), "digest"},
		"refers to a name":      {list(&pb.ListRequest{Tag: &task.Tag, Kind: all, RefersTo: "v1"}), "digest"},
		"offset":                {add(&pb.IngestRequest_Add{Offset: -1}), "negative"},
		"want":                  {add(&pb.IngestRequest_Add{Want: "md5:00"}), "unknown algorithm"},
		"algorithm":             {add(&pb.IngestRequest_Add{Algorithm: "md5"}), "unknown algorithm"},
		"add":                   {add(&pb.IngestRequest_Add{Want: d, Algorithm: "sha512"}), ""},
		"rehash":                {rehash(&pb.IngestRequest_Rehash{Digest: d, Want: other}), ""},
		"rehash of a name":      {rehash(&pb.IngestRequest_Rehash{Digest: "v1", Want: other}), "digest"},
		"rehash to nothing":     {rehash(&pb.IngestRequest_Rehash{Digest: d}), "digest"},
		"media type":            {typed(strings.Repeat("x", 255)), ""},
		"long media type":       {typed(strings.Repeat("x", 256)), "256 characters"},
		"media type with LF":    {typed("a\nb"), "printable"},
		"media type with é":     {typed("é"), "printable"},
		"keep missing":          {newTask(&pb.NewTask{}), "keep 0"},
		"keep unknown":          {newTask(&pb.NewTask{Keep: 4}), "keep 4"},
		"refs": {manifest(
			&pb.NewTask_Manifest{Refs: slices.Repeat([]string{ref}, p2p.MaxManifestRefs)}), ""},
		"many refs": {manifest(
			&pb.NewTask_Manifest{Refs: slices.Repeat([]string{ref}, p2p.MaxManifestRefs+1)}), "10001"},
		"ref":              {manifest(&pb.NewTask_Manifest{Refs: []string{"v1"}}), "digest"},
		"refers to itself": {manifest(&pb.NewTask_Manifest{Refs: []string{d}}), "itself"},
		"needs": {manifest(&pb.NewTask_Manifest{Refs: []string{ref, other}, Needs: []string{other}}),
			""},
		"many needs": {manifest(
			&pb.NewTask_Manifest{Refs: []string{ref}, Needs: slices.Repeat([]string{ref}, p2p.MaxManifestRefs+1)}),
			"10001"},
		"needs what it lacks": {manifest(&pb.NewTask_Manifest{Refs: []string{ref}, Needs: []string{other}}),
			"does not refer"},
		"subject":             {manifest(&pb.NewTask_Manifest{Subject: other}), ""},
		"subject is a name":   {manifest(&pb.NewTask_Manifest{Subject: "v1"}), "digest"},
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
	part := &pb.IngestRequest_Commit{Tasks: []*pb.NewTask{{
		Task: task, Keep: pb.Keep_KEEP_HELD,
		Manifest: &pb.NewTask_Manifest{Refs: slices.Repeat([]string{ref}, p2p.MaxManifestRefs)},
	}}}
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

// A daemon that answers nonsense gives an error, and not one of the caller.
func TestBadAnswers(t *testing.T) {
	bad := &pb.Info{Task: &pb.Task{Tag: "X", Digest: string(someTask.Digest)}, Keep: pb.Keep_KEEP_HELD}
	kept := &pb.Info{Task: taskMessage(someTask), Keep: 9}
	good := infoMessage(p2p.Info{Task: someTask})
	stat := func(r *pb.StatReply) error { _, err := statOf(r); return err }
	holders := func(h *pb.Holders) error { return stat(&pb.StatReply{Info: good, Holders: h}) }
	deleted := func(r *pb.DeleteReply) error { _, err := deletedOf(r); return err }
	peer := func(p *pb.Peer) error { _, err := parsePeer(p); return err }
	sources := func(s *pb.Source) error { _, err := sourcesOf([]*pb.Source{s}); return err }
	sized := infoMessage(p2p.Info{Task: someTask, Size: -1})
	entry := func(e *pb.Entry, kind p2p.Kind) error { _, err := entryOf(e, kind); return err }
	for name, err := range map[string]error{
		"size":            stat(&pb.StatReply{Info: sized}),
		"whole of some":   holders(&pb.Holders{Some: 1, Whole: 2}),
		"silent of asked": holders(&pb.Holders{Asked: 1, Silent: 2}),
		"negative whole":  holders(&pb.Holders{Whole: -1}),
		"tasks":           deleted(&pb.DeleteReply{Tasks: -1}),
		"removed":         deleted(&pb.DeleteReply{Reached: 1, Removed: 2}),
		"state":           peer(&pb.Peer{Id: "p"}),
		"latency":         peer(&pb.Peer{State: pb.PeerState_PEER_STATE_AWAY, LatencyNano: -1}),
		"source":          sources(&pb.Source{Bytes: -1}),
		"nothing":         stat(&pb.StatReply{}),
		"tag":             stat(&pb.StatReply{Info: bad}),
		"keep":            stat(&pb.StatReply{Info: kept}),
		"ref": stat(&pb.StatReply{
			Info: good, Manifest: &pb.StatReply_Manifest{Refs: []*pb.Info{good, bad}}}),
		"entry": entry(&pb.Entry{Info: bad}, p2p.KindAll),
		"name":  entry(&pb.Entry{Info: &pb.Info{Task: &pb.Task{Tag: "x"}}}, p2p.KindNames),
		"tags":  entry(&pb.Entry{Info: bad}, p2p.KindTags),
	} {
		if err == nil || errors.Is(err, digest.ErrInvalid) || !strings.Contains(err.Error(), "daemon's answer") {
			t.Errorf("%s: %v", name, err)
		}
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
		if parser.table.Size != table.Size || parser.table.PieceLength != table.PieceLength ||
			!slices.Equal(parser.table.CRC, table.CRC) {
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
		"pieces of a whole":  {{Header: header, Crc32C: []uint32{1}, Pieces: []*pb.OpenReply_Piece{{}}}},
		"done first":         {{Done: &pb.OpenReply_Done{}}},
		"arriving checksums": {
			{Header: &pb.OpenReply_Header{Size: 100, PieceLength: digest.MinPieceLength, Arriving: true},
				Crc32C: []uint32{1}}},
		"arriving forever": {
			{Header: &pb.OpenReply_Header{Size: 1<<63 - 1, PieceLength: digest.MaxPieceLength, Arriving: true}}},
		"arriving and huge": {
			{Header: &pb.OpenReply_Header{
				Size: maxPieces*digest.MaxPieceLength + 1, PieceLength: digest.MaxPieceLength, Arriving: true}}},
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
