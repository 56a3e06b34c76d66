package rpc

import (
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/rpc/pb"
)

// The limits of what a request may hold.
const (
	maxMessage   = 4 << 20  // bytes of one message
	maxMediaType = 255      // bytes
	maxRefs      = 10_000   // of one task
	maxCommit    = 64 << 20 // bytes of all parts of a commit
)

// Everything in a request is checked here, once, as it becomes the engine's
// words. Errors wrap [digest.ErrInvalid].

func parseScope(s pb.Scope) (p2p.Scope, error) {
	switch s {
	case pb.Scope_SCOPE_NETWORK:
		return p2p.Network, nil
	case pb.Scope_SCOPE_LOCAL:
		return p2p.Local, nil
	}
	return 0, fmt.Errorf("scope %d: %w: it is neither local nor network", s, digest.ErrInvalid)
}

func parseTask(t *pb.Task) (p2p.Task, error) {
	task := p2p.Task{Tag: t.GetTag(), Digest: digest.Digest(t.GetDigest())}
	return task, task.Validate()
}

func parseName(tag, cid string) (digest.CID, error) {
	if err := p2p.ValidateTag(tag); err != nil {
		return digest.CID{}, err
	}
	return digest.ParseCID(cid)
}

func parseResolve(r *pb.ResolveRequest) (cid digest.CID, scope p2p.Scope, err error) {
	if cid, err = parseName(r.GetTag(), r.GetCid()); err != nil {
		return cid, 0, err
	}
	scope, err = parseScope(r.GetScope())
	return cid, scope, err
}

func parseStat(r *pb.StatRequest) (task p2p.Task, scope p2p.Scope, err error) {
	if task, err = parseTask(r.GetTask()); err != nil {
		return task, 0, err
	}
	scope, err = parseScope(r.GetScope())
	return task, scope, err
}

func parseOpen(r *pb.OpenRequest) (task p2p.Task, scope p2p.Scope, err error) {
	if task, err = parseTask(r.GetTask()); err != nil {
		return task, 0, err
	}
	scope, err = parseScope(r.GetScope())
	return task, scope, err
}

func parseDelete(r *pb.DeleteRequest) (digest.CID, error) { return parseName(r.GetTag(), r.GetCid()) }

func parseList(r *pb.ListRequest) (tag *string, err error) {
	if r.Tag == nil {
		return nil, nil
	}
	return r.Tag, p2p.ValidateTag(*r.Tag)
}

func parseAdd(r *pb.IngestRequest_Add) (p2p.AddOptions, error) {
	var opts p2p.AddOptions
	var err error
	if r.GetOffset() < 0 {
		return opts, fmt.Errorf("offset %d: %w: it is negative", r.GetOffset(), digest.ErrInvalid)
	}
	if r.GetWant() != "" {
		if opts.Want, err = digest.Parse(r.GetWant()); err != nil {
			return opts, err
		}
	}
	if r.GetAlgorithm() != "" {
		if opts.Algorithm, err = digest.ParseAlgorithm(r.GetAlgorithm()); err != nil {
			return opts, err
		}
	}
	return opts, nil
}

// commitParser puts the parts of a commit together.
type commitParser struct {
	commit p2p.Commit
	size   int // bytes of the parts so far
}

func (p *commitParser) add(part *pb.IngestRequest_Commit) error {
	if p.size += proto.Size(part); p.size > maxCommit {
		return fmt.Errorf("commit: %w: it has more than %d bytes: commit less at once", digest.ErrInvalid, maxCommit)
	}
	for _, t := range part.GetTasks() {
		task, err := parseNewTask(t)
		if err != nil {
			return err
		}
		p.commit.Tasks = append(p.commit.Tasks, task)
	}
	for _, n := range part.GetNames() {
		name, err := parseNewName(n)
		if err != nil {
			return err
		}
		p.commit.Names = append(p.commit.Names, name)
	}
	return nil
}

func parseNewTask(t *pb.NewTask) (p2p.NewTask, error) {
	task, err := parseTask(t.GetTask())
	if err != nil {
		return p2p.NewTask{}, err
	}
	if err := validateMediaType(t.GetMediaType()); err != nil {
		return p2p.NewTask{}, fmt.Errorf("task %s: %w", task, err)
	}
	if n := len(t.GetRefs()); n > maxRefs {
		return p2p.NewTask{}, fmt.Errorf("task %s: %w: it refers to %d others, at most %d can be kept", task, digest.ErrInvalid, n, maxRefs)
	}
	refs := make([]digest.Digest, len(t.GetRefs()))
	for i, ref := range t.GetRefs() {
		if refs[i], err = digest.Parse(ref); err != nil {
			return p2p.NewTask{}, fmt.Errorf("task %s: %w", task, err)
		}
	}
	return p2p.NewTask{Task: task, MediaType: t.GetMediaType(), Pinned: t.GetPinned(), Refs: refs}, nil
}

func parseNewName(n *pb.NewName) (p2p.NewName, error) {
	task, err := parseTask(&pb.Task{Tag: n.GetTag(), Digest: n.GetDigest()})
	if err != nil {
		return p2p.NewName{}, err
	}
	cid, err := digest.ParseCID(n.GetName())
	if err == nil && cid.CacheID() == "" {
		err = fmt.Errorf("name %q: %w: a digest can't be the name of a task", n.GetName(), digest.ErrInvalid)
	}
	return p2p.NewName{Tag: task.Tag, Name: n.GetName(), Digest: task.Digest}, err
}

func validateMediaType(s string) error {
	if len(s) > maxMediaType {
		return fmt.Errorf("media type: %w: it has %d characters, at most %d are allowed", digest.ErrInvalid, len(s), maxMediaType)
	}
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return fmt.Errorf("media type %q: %w: it has a character outside printable ASCII", s, digest.ErrInvalid)
		}
	}
	return nil
}

// The way back: the engine's words as messages.

func scopeMessage(s p2p.Scope) pb.Scope {
	switch s {
	case p2p.Network:
		return pb.Scope_SCOPE_NETWORK
	case p2p.Local:
		return pb.Scope_SCOPE_LOCAL
	}
	return pb.Scope_SCOPE_UNSPECIFIED // which the server refuses
}

func taskMessage(t p2p.Task) *pb.Task {
	return &pb.Task{Tag: t.Tag, Digest: string(t.Digest)}
}

func infoMessage(i p2p.Info) *pb.Info {
	return &pb.Info{
		Task:             taskMessage(i.Task),
		Size:             i.Size,
		PieceLength:      i.PieceLength,
		Pieces:           int64(i.Pieces),
		Held:             int64(i.Held),
		MediaType:        i.MediaType,
		Pinned:           i.Pinned,
		ImportedUnixNano: nanoseconds(i.Imported),
		LastUsedUnixNano: nanoseconds(i.LastUsed),
	}
}

func nanoseconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func timeOf(nanoseconds int64) time.Time {
	if nanoseconds == 0 {
		return time.Time{}
	}
	return time.Unix(0, nanoseconds)
}

// commitParts yields c as messages of at most part bytes, as far as a single
// task allows.
func commitParts(c p2p.Commit, part int) []*pb.IngestRequest_Commit {
	now, size := &pb.IngestRequest_Commit{}, 0
	parts := []*pb.IngestRequest_Commit{now}
	grow := func(m proto.Message) {
		n := proto.Size(m)
		if size > 0 && size+n > part {
			now.More = true
			now, size = &pb.IngestRequest_Commit{}, 0
			parts = append(parts, now)
		}
		size += n
	}
	for _, t := range c.Tasks {
		m := &pb.NewTask{Task: taskMessage(t.Task), MediaType: t.MediaType, Pinned: t.Pinned, Refs: make([]string, len(t.Refs))}
		for i, ref := range t.Refs {
			m.Refs[i] = string(ref)
		}
		grow(m)
		now.Tasks = append(now.Tasks, m)
	}
	for _, n := range c.Names {
		m := &pb.NewName{Tag: n.Tag, Name: n.Name, Digest: string(n.Digest)}
		grow(m)
		now.Names = append(now.Names, m)
	}
	return parts
}

// What a daemon answers is taken as it is, but for what would break the caller's
// own rules.

func taskOf(t *pb.Task) (p2p.Task, error) {
	task, err := parseTask(t)
	if err != nil {
		return p2p.Task{}, fmt.Errorf("the daemon's answer: %s", err) // not the caller's error
	}
	return task, nil
}

func infoOf(i *pb.Info) (p2p.Info, error) {
	task, err := taskOf(i.GetTask())
	if err != nil {
		return p2p.Info{}, err
	}
	return p2p.Info{
		Task:        task,
		Size:        i.GetSize(),
		PieceLength: i.GetPieceLength(),
		Pieces:      int(i.GetPieces()),
		Held:        int(i.GetHeld()),
		MediaType:   i.GetMediaType(),
		Pinned:      i.GetPinned(),
		Imported:    timeOf(i.GetImportedUnixNano()),
		LastUsed:    timeOf(i.GetLastUsedUnixNano()),
	}, nil
}

// maxChecksums is the number of checksums in one message of an Open.
const maxChecksums = 64 << 10 / 4

// openMessages returns the messages that describe t, the last of which says
// that the descriptor was sent.
func openMessages(t *digest.Table) []*pb.OpenReply {
	first := &pb.OpenReply{Header: &pb.OpenReply_Header{Size: t.Size, PieceLength: t.PieceLength}}
	messages := []*pb.OpenReply{first}
	for crc := t.CRC; len(crc) > 0; {
		n := min(len(crc), maxChecksums)
		last := messages[len(messages)-1]
		if len(last.Crc32C) > 0 {
			last = &pb.OpenReply{}
			messages = append(messages, last)
		}
		last.Crc32C, crc = crc[:n], crc[n:]
	}
	messages[len(messages)-1].Sent = true
	return messages
}

// tableParser makes a piece table of the messages of an Open.
type tableParser struct{ table *digest.Table }

func (p *tableParser) add(d digest.Digest, m *pb.OpenReply) error {
	if h := m.GetHeader(); h != nil {
		if p.table != nil {
			return errors.New("the daemon's answer has two headers")
		}
		if h.GetSize() < 0 || h.GetPieceLength() != digest.PieceLength(h.GetSize()) {
			return fmt.Errorf("the daemon's answer: pieces of %d bytes do not fit a blob of %d bytes", h.GetPieceLength(), h.GetSize())
		}
		p.table = &digest.Table{Digest: d, Size: h.GetSize(), PieceLength: h.GetPieceLength()}
	}
	if p.table == nil {
		if len(m.GetCrc32C()) > 0 || m.GetSent() {
			return errors.New("the daemon's answer has no header")
		}
		return nil
	}
	if p.table.CRC == nil {
		p.table.CRC = m.GetCrc32C() // the message is not used for anything else
	} else {
		p.table.CRC = append(p.table.CRC, m.GetCrc32C()...)
	}
	if n := len(p.table.CRC); n > p.table.Pieces() || m.GetSent() && n < p.table.Pieces() {
		return fmt.Errorf("the daemon's answer has %d checksums for %d pieces", n, p.table.Pieces())
	}
	return nil
}
