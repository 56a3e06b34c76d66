package rpc

import (
	"fmt"
	"strings"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/protobuf/proto"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/rpc/pb"
)

// The limits of what a request may hold.
const (
	maxRequest  = 4 << 20       // bytes of one message
	maxElements = 1 << 16       // of one message, in either direction: see package grpclimit
	maxHeaders  = 64 << 10      // bytes of a call's headers
	maxCommit   = 64 << 20      // bytes of all parts of a commit
	maxCommits  = 2 * maxCommit // of all that are under way
	maxReplicas = 1 << 20       // peers
)

// maxPieces is the number of pieces that a blob that is arriving may have. They
// are counted before the first is there: it bounds what a header makes a client
// allocate. With the longest pieces it is 16 TiB, the largest file of ext4.
const maxPieces = 4 << 20

// maxReply is the length in bytes of the longest message that a daemon sends: a
// manifest with p2p.MaxRefs descriptions of what it refers to, each of which is
// shorter than 1 KiB.
const maxReply = p2p.MaxManifest + 1<<20

// enum pairs an enumeration of the protocol with the engine's. In the protocol, 0
// is none of the words: it says that a field is missing.
type enum[M ~int32, E comparable] map[M]E

var (
	scopes = enum[pb.Scope, p2p.Scope]{
		pb.Scope_SCOPE_NETWORK: p2p.Network,
		pb.Scope_SCOPE_LOCAL:   p2p.Local,
	}
	keeps = enum[pb.Keep, p2p.Keep]{
		pb.Keep_KEEP_HELD:   p2p.KeepReferred,
		pb.Keep_KEEP_LOOSE:  p2p.KeepUntilReferred,
		pb.Keep_KEEP_PINNED: p2p.KeepPinned,
	}
	listKinds = enum[pb.Kind, p2p.Kind]{
		pb.Kind_KIND_ALL:   p2p.KindAll,
		pb.Kind_KIND_NAMES: p2p.KindNames,
		pb.Kind_KIND_TAGS:  p2p.KindTags,

		pb.Kind_KIND_PARTIALS: p2p.KindPartials,
	}
	peerStates = enum[pb.PeerState, p2p.PeerState]{
		pb.PeerState_PEER_STATE_CONNECTED: p2p.PeerConnected,
		pb.PeerState_PEER_STATE_AWAY:      p2p.PeerAway,
		pb.PeerState_PEER_STATE_SHUNNED:   p2p.PeerShunned,
		pb.PeerState_PEER_STATE_FOREIGN:   p2p.PeerForeign,
		pb.PeerState_PEER_STATE_CLONED:    p2p.PeerCloned,
	}
)

// message returns the protocol's word, or 0, which the other side refuses.
func (e enum[M, E]) message(word E) M {
	for m, w := range e {
		if w == word {
			return m
		}
	}
	return 0
}

// parse returns the engine's word. what says in messages what it is.
func (e enum[M, E]) parse(what string, m M) (word E, err error) {
	word, ok := e[m]
	if !ok {
		err = fmt.Errorf("%s %d: %w: it is missing, or not known", what, m, digest.ErrInvalid)
	}
	return word, err
}

// Everything in a request is checked as it becomes the engine's words: by the
// Validate of each. Errors wrap [digest.ErrInvalid].

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

func parseStat(r *pb.StatRequest) (cid digest.CID, opts p2p.StatOptions, err error) {
	opts = p2p.StatOptions{Manifest: r.GetManifest(), Providers: r.GetHolders(), Lease: r.GetLease()}
	if cid, err = digest.ParseCID(r.GetCid()); err != nil {
		return cid, opts, err
	}
	if opts.Scope, err = scopes.parse("scope", r.GetScope()); err != nil {
		return cid, opts, err
	}
	return cid, opts, opts.Validate(r.GetTag(), cid)
}

func parseOpen(r *pb.OpenRequest) (task p2p.Task, scope p2p.Scope, err error) {
	if task, err = parseTask(r.GetTask()); err != nil {
		return task, 0, err
	}
	if r.GetWant() != nil {
		return task, 0, fmt.Errorf("open %s: %w: pieces are asked for when it is open", task, digest.ErrInvalid)
	}
	scope, err = scopes.parse("scope", r.GetScope())
	return task, scope, err
}

// parseWant reads which of a blob's pieces are wanted first.
func parseWant(r *pb.OpenRequest, pieces int) (first, last int, err error) {
	want := r.GetWant()
	first, last = int(want.GetFirst()), int(want.GetLast())
	switch {
	case want == nil || r.GetTask() != nil:
		err = fmt.Errorf("open: %w: the first request says what to open, and those after it want pieces",
			digest.ErrInvalid)
	case first > last || last >= pieces:
		err = fmt.Errorf("pieces %d to %d: %w: the blob has %d", first, last, digest.ErrInvalid, pieces)
	}
	return first, last, err
}

func parseReplicate(r *pb.ReplicateRequest) (cid digest.CID, n int, err error) {
	if cid, err = parseName(r.GetTag(), r.GetCid()); err != nil {
		return cid, 0, err
	}
	if r.GetN() < 0 || r.GetN() > maxReplicas {
		return cid, 0, fmt.Errorf("replicate %s to %d peers: %w: want a number up to %d", cid, r.GetN(),
			digest.ErrInvalid, maxReplicas)
	}
	return cid, int(r.GetN()), nil
}

func parseDelete(r *pb.DeleteRequest) (cid digest.CID, opts p2p.DeleteOptions, err error) {
	opts = p2p.DeleteOptions{Force: r.GetForce(), NameOnly: r.GetNameOnly(), All: r.GetAll(),
		Unpin: r.GetUnpin(), Expect: (*digest.Digest)(r.Expect)}
	all := r.GetCids()
	if len(all) == 0 && (!opts.All || r.GetCid() != "") {
		all = []string{r.GetCid()}
	}
	for i, s := range all[:min(len(all), p2p.MaxAlso+2)] { // one too many is for Validate to refuse
		c, err := digest.ParseCID(s)
		if err != nil {
			return cid, opts, err
		}
		if i == 0 {
			cid = c
		} else {
			opts.Also = append(opts.Also, c)
		}
	}
	return cid, opts, opts.Validate(r.GetTag(), cid)
}

func parseList(r *pb.ListRequest) (q p2p.Query, err error) {
	q = p2p.Query{
		Tag: r.Tag, After: string(r.GetAfter()),
		RefersTo: digest.Digest(r.GetRefersTo()), Has: digest.Digest(r.GetHas()),
	}
	if q.Kind, err = listKinds.parse("kind", r.GetKind()); err != nil {
		return q, err
	}
	return q, q.Validate()
}

func parseAdd(r *pb.IngestRequest_Add) (p2p.AddOptions, error) {
	opts := p2p.AddOptions{Want: digest.Digest(r.GetWant()), Algorithm: digest.Algorithm(r.GetAlgorithm())}
	if r.GetOffset() < 0 {
		return opts, fmt.Errorf("offset %d: %w: it is negative", r.GetOffset(), digest.ErrInvalid)
	}
	return opts, opts.Validate()
}

func parseRehash(r *pb.IngestRequest_Rehash) (d, want digest.Digest, err error) {
	if d, err = digest.Parse(r.GetDigest()); err != nil {
		return "", "", err
	}
	want, err = digest.Parse(r.GetWant())
	return d, want, err
}

// commitParser puts the parts of a commit together.
type commitParser struct {
	commit p2p.Commit
	size   int                 // bytes of the parts so far
	room   *semaphore.Weighted // for the parts of all commits; nil: no limit
	taken  int                 // bytes of it
}

// end gives back the room. The commit is not to be used any more.
func (p *commitParser) end() {
	if p.taken > 0 {
		p.room.Release(int64(p.taken))
	}
}

func (p *commitParser) add(part *pb.IngestRequest_Commit) error {
	size := proto.Size(part)
	if p.size += size; p.size > maxCommit {
		return fmt.Errorf("commit: %w: it has more than %d bytes: commit less at once", digest.ErrInvalid, maxCommit)
	}
	if p.room != nil {
		// A caller that waited here would keep the room of its first parts from others who wait.
		if !p.room.TryAcquire(int64(size)) {
			return fmt.Errorf("commit: %w: other commits that are under way have %d bytes together: try again",
				p2p.ErrBusy, maxCommits)
		}
		p.taken += size
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
	for _, e := range part.GetExpect() {
		expect := p2p.Expectation{Tag: e.GetTag(), Digest: digest.Digest(e.GetDigest())}
		var err error
		if expect.CID, err = digest.ParseCID(e.GetCid()); err == nil {
			err = expect.Validate()
		}
		if err != nil {
			return err
		}
		p.commit.Expect = append(p.commit.Expect, expect)
	}
	return nil
}

func parseNewTask(t *pb.NewTask) (p2p.NewTask, error) {
	n := p2p.NewTask{
		Task:      p2p.Task{Tag: t.GetTask().GetTag(), Digest: digest.Digest(t.GetTask().GetDigest())},
		MediaType: t.GetMediaType(),
		Origin:    timeOf(t.GetOriginUnixNano()),
	}
	var err error
	if n.Keep, err = keeps.parse("keep", t.GetKeep()); err != nil {
		return n, fmt.Errorf("task %s: %w", n.Task, err)
	}
	if m := t.GetManifest(); m != nil {
		n.Manifest = &p2p.NewManifest{Refs: digestsOf(m.GetRefs()), Needs: digestsOf(m.GetNeeds()),
			Subject: digest.Digest(m.GetSubject())}
	}
	return n, n.Validate()
}

func digestsOf(texts []string) (digests []digest.Digest) {
	for _, text := range texts {
		digests = append(digests, digest.Digest(text))
	}
	return digests
}

func parseNewName(n *pb.NewName) (p2p.NewName, error) {
	name := p2p.NewName{
		Tag: n.GetTag(), Name: n.GetName(), Digest: digest.Digest(n.GetDigest()),
		MediaType: n.GetMediaType(), Description: n.Description,
		Updated: timeOf(n.GetUpdatedUnixNano()), KeepOld: n.GetKeepOld(),
	}
	return name, name.Validate()
}

// The way back: the engine's words as messages.

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
		Remote:           i.Remote,
		MediaType:        i.MediaType,
		IsManifest:       i.IsManifest,
		Keep:             keeps.message(i.Keep),
		OriginUnixNano:   nanoseconds(i.Origin),
		ImportedUnixNano: nanoseconds(i.Imported),
		LastUsedUnixNano: nanoseconds(i.LastUsed),
		Lacks:            stringsOf(i.Lacks),
		Description:      i.Description,
	}
}

func manifestMessage(m *p2p.Manifest) *pb.StatReply_Manifest {
	if m == nil {
		return nil
	}
	message := &pb.StatReply_Manifest{Content: m.Content}
	for _, ref := range m.Refs {
		message.Refs = append(message.Refs, infoMessage(ref))
	}
	return message
}

func holdersMessage(h *p2p.Providers) *pb.Holders {
	if h == nil {
		return nil
	}
	return &pb.Holders{Some: int64(h.Some), Whole: int64(h.Whole), Asked: int64(h.Asked), Silent: int64(h.Silent)}
}

func deletedMessage(d p2p.Deleted) *pb.DeleteReply {
	message := &pb.DeleteReply{Tasks: int64(d.Tasks), Freed: d.Freed, Reached: int64(d.Reached),
		Removed: int64(d.Removed)}
	for _, m := range d.Missed {
		message.Missed = append(message.Missed,
			&pb.DeleteReply_Missed{Peer: valid(m.Peer), Address: valid(m.Address), Reason: valid(m.Reason)})
	}
	for _, c := range d.NotFound {
		message.NotFound = append(message.NotFound, c.String())
	}
	return message
}

func peerMessage(p p2p.Peer) *pb.Peer {
	message := &pb.Peer{
		Id:               valid(p.ID),
		State:            peerStates.message(p.State),
		Mode:             valid(p.Mode),
		Gave:             p.Gave,
		Took:             p.Took,
		LatencyNano:      int64(p.Latency),
		LastSeenUnixNano: nanoseconds(p.LastSeen),
		Faults:           int64(p.Faults),
		Reason:           valid(p.Reason),
		Version:          valid(p.Version),
		AheadNano:        int64(p.Ahead),
	}
	for _, address := range p.Addresses {
		message.Addresses = append(message.Addresses, valid(address))
	}
	return message
}

func sourceMessages(sources []p2p.Source) (messages []*pb.Source) {
	for _, s := range sources {
		messages = append(messages, &pb.Source{Peer: valid(s.Peer), Address: valid(s.Address), Bytes: s.Bytes})
	}
	return messages
}

// valid returns s as the text of a message can be: UTF-8. What comes from peers,
// or is the text of an error, can hold anything.
func valid(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

func addedMessage(a p2p.Added) *pb.IngestReply {
	return &pb.IngestReply{Reply: &pb.IngestReply_Added_{Added: &pb.IngestReply_Added{
		Digest: string(a.Digest),
		Size:   a.Size,
	}}}
}

func addMessage(o p2p.AddOptions) *pb.IngestRequest_Add {
	return &pb.IngestRequest_Add{Want: string(o.Want), Algorithm: string(o.Algorithm)}
}

func queryMessage(q p2p.Query) *pb.ListRequest {
	return &pb.ListRequest{
		Tag: q.Tag, Kind: listKinds.message(q.Kind), After: []byte(q.After),
		RefersTo: string(q.RefersTo), Has: string(q.Has),
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
		m := &pb.NewTask{Task: taskMessage(t.Task), MediaType: t.MediaType, Keep: keeps.message(t.Keep),
			OriginUnixNano: nanoseconds(t.Origin)}
		if t.Manifest != nil {
			m.Manifest = &pb.NewTask_Manifest{
				Refs:    stringsOf(t.Manifest.Refs),
				Needs:   stringsOf(t.Manifest.Needs),
				Subject: string(t.Manifest.Subject),
			}
		}
		grow(m)
		now.Tasks = append(now.Tasks, m)
	}
	for _, n := range c.Names {
		m := &pb.NewName{Tag: n.Tag, Name: n.Name, Digest: string(n.Digest), KeepOld: n.KeepOld, MediaType: n.MediaType,
			Description: n.Description, UpdatedUnixNano: nanoseconds(n.Updated)}
		grow(m)
		now.Names = append(now.Names, m)
	}
	for _, e := range c.Expect {
		m := &pb.Expectation{Tag: e.Tag, Cid: e.CID.String(), Digest: string(e.Digest)}
		grow(m)
		now.Expect = append(now.Expect, m)
	}
	return parts
}

func stringsOf(digests []digest.Digest) []string {
	s := make([]string, len(digests))
	for i, d := range digests {
		s[i] = string(d)
	}
	return s
}

// What a daemon answers is taken as it is, but for what would break the caller's
// own rules.

// answerError makes of what a parser found in an answer an error that is not the
// caller's own.
func answerError(err error) error { return fmt.Errorf("the daemon's answer: %s", err) }

func infoOf(i *pb.Info) (p2p.Info, error) {
	task, err := parseTask(i.GetTask())
	if err != nil {
		return p2p.Info{}, answerError(err)
	}
	keep, err := keeps.parse("keep", i.GetKeep())
	if err != nil {
		return p2p.Info{}, answerError(err)
	}
	if i.GetSize() < 0 || i.GetPieces() < 0 || i.GetHeld() < 0 {
		return p2p.Info{}, fmt.Errorf("the daemon's answer: %s has %d bytes, and %d of %d pieces", task, i.GetSize(),
			i.GetHeld(), i.GetPieces())
	}
	var lacks []digest.Digest
	for _, d := range i.GetLacks() {
		lacks = append(lacks, digest.Digest(d))
	}
	return p2p.Info{
		Task:        task,
		Lacks:       lacks,
		Description: i.Description,
		Size:        i.GetSize(),
		PieceLength: i.GetPieceLength(),
		Pieces:      int(i.GetPieces()),
		Held:        int(i.GetHeld()),
		Remote:      i.GetRemote(),
		MediaType:   i.GetMediaType(),
		IsManifest:  i.GetIsManifest(),
		Keep:        keep,
		Origin:      timeOf(i.GetOriginUnixNano()),
		Imported:    timeOf(i.GetImportedUnixNano()),
		LastUsed:    timeOf(i.GetLastUsedUnixNano()),
	}, nil
}

func statOf(r *pb.StatReply) (p2p.Info, error) {
	info, err := infoOf(r.GetInfo())
	if err != nil {
		return p2p.Info{}, err
	}
	if h := r.GetHolders(); h != nil {
		if h.GetWhole() < 0 || h.GetSome() < h.GetWhole() || h.GetSilent() < 0 || h.GetAsked() < h.GetSilent() {
			return p2p.Info{}, fmt.Errorf("the daemon's answer: %d peers hold it, %d of them whole; %d were asked, "+
				"%d of them did not answer", h.GetSome(), h.GetWhole(), h.GetAsked(), h.GetSilent())
		}
		info.Providers = &p2p.Providers{
			Some: int(h.GetSome()), Whole: int(h.GetWhole()), Asked: int(h.GetAsked()), Silent: int(h.GetSilent())}
	}
	if r.GetManifest() == nil {
		return info, nil
	}
	info.Manifest = &p2p.Manifest{Content: r.GetManifest().GetContent()}
	for _, i := range r.GetManifest().GetRefs() {
		ref, err := infoOf(i)
		if err != nil {
			return p2p.Info{}, err
		}
		info.Manifest.Refs = append(info.Manifest.Refs, ref)
	}
	return info, nil
}

func entryOf(e *pb.Entry, kind p2p.Kind) (p2p.Entry, error) {
	if kind == p2p.KindTags {
		tag := e.GetInfo().GetTask().GetTag()
		if err := p2p.ValidateTag(tag); err != nil {
			return p2p.Entry{}, answerError(err)
		}
		return p2p.Entry{Info: p2p.Info{Task: p2p.Task{Tag: tag}}}, nil
	}
	info, err := infoOf(e.GetInfo())
	if err != nil {
		return p2p.Entry{}, err
	}
	return p2p.Entry{Info: info, Name: e.GetName(), Total: e.GetTotal()}, nil
}

func deletedOf(r *pb.DeleteReply) (p2p.Deleted, error) {
	d := p2p.Deleted{Tasks: int(r.GetTasks()), Freed: r.GetFreed(), Reached: int(r.GetReached()),
		Removed: int(r.GetRemoved())}
	if d.Tasks < 0 || d.Freed < 0 || d.Removed < 0 || d.Reached < d.Removed {
		return p2p.Deleted{}, fmt.Errorf("the daemon's answer: %d tasks and %d bytes were deleted, on %d of %d peers",
			d.Tasks, d.Freed, d.Removed, d.Reached)
	}
	for _, m := range r.GetMissed() {
		d.Missed = append(d.Missed, p2p.Missed{Peer: m.GetPeer(), Address: m.GetAddress(), Reason: m.GetReason()})
	}
	for _, s := range r.GetNotFound() {
		c, err := digest.ParseCID(s)
		if err != nil {
			return p2p.Deleted{}, answerError(err)
		}
		d.NotFound = append(d.NotFound, c)
	}
	return d, nil
}

func parsePeer(p *pb.Peer) (p2p.Peer, error) {
	state, err := peerStates.parse("state of peer "+p.GetId(), p.GetState())
	if err != nil {
		return p2p.Peer{}, answerError(err)
	}
	if p.GetGave() < 0 || p.GetTook() < 0 || p.GetLatencyNano() < 0 || p.GetFaults() < 0 {
		return p2p.Peer{}, fmt.Errorf("the daemon's answer: peer %s has a negative count", p.GetId())
	}
	return p2p.Peer{
		ID:        p.GetId(),
		Addresses: p.GetAddresses(),
		State:     state,
		Mode:      p.GetMode(),
		Gave:      p.GetGave(),
		Took:      p.GetTook(),
		Latency:   time.Duration(p.GetLatencyNano()),
		LastSeen:  timeOf(p.GetLastSeenUnixNano()),
		Faults:    int(p.GetFaults()),
		Reason:    p.GetReason(),
		Version:   p.GetVersion(),
		Ahead:     time.Duration(p.GetAheadNano()),
	}, nil
}

func sourcesOf(messages []*pb.Source) (sources []p2p.Source, err error) {
	for _, s := range messages {
		if s.GetBytes() < 0 {
			return nil, fmt.Errorf("the daemon's answer: peer %s has given %d bytes", s.GetPeer(), s.GetBytes())
		}
		sources = append(sources, p2p.Source{Peer: s.GetPeer(), Address: s.GetAddress(), Bytes: s.GetBytes()})
	}
	return sources, nil
}
