package swarm

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"golang.org/x/sync/semaphore"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/jsonlimit"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
)

// The API that peers speak with each other: HTTP/1.1 with JSON, on connections
// whose both ends are proven. Pieces are binary. docs/swarm.md describes it.
const (
	pathHello     = "/v1/hello"     // GET: hello
	pathFind      = "/v1/find"      // POST findRequest: findReply
	pathBlob      = "/v1/blob"      // GET ?tag&digest: a small blob
	pathLinks     = "/v1/links"     // GET ?tag&digest: size and hash chain
	pathPieces    = "/v1/pieces"    // POST ?tag&digest pieceRequest: pieceReply and a piece
	pathDeletes   = "/v1/deletes"   // GET ?after&sum: deletesReply; POST deletesRequest: deletesResult
	pathReplicate = "/v1/replicate" // POST ?tag&cid: nothing, when it is held
)

// Bounds of what a peer may send.
const (
	maxFind      = 512     // tasks, names and subjects in one request
	maxReferrers = 1024    // in one answer
	maxFollowed  = 16      // tasks in one answer that names lead to
	maxHints     = 16      // peers named in one answer
	maxHintAddrs = 16      // addresses of one of them that are looked at; half as many are told
	maxDeletes   = 1024    // in one message
	maxJSON      = 4 << 20 // bytes of any JSON message; most kinds have less
	maxPieces    = 1 << 20 // pieces of one blob: 4 TiB, whose hash chain has 32 MiB
)

// Errors of messages.
var errMessage = errors.New("malformed message")

// message is a JSON message. It says how many bytes it may have, and how many
// elements (see package jsonlimit): a few bytes can be many in memory. Fields that a later version
// may add are allowed for.
type message interface{ bounds() (bytes, elements int) }

const (
	hintElements = 4 + 2*maxHintAddrs
	taskElements = 16 + maxHints*hintElements
	nameElements = 16
)

func (*hello) bounds() (bytes, elements int)       { return 64 << 10, 1024 }
func (*findRequest) bounds() (bytes, elements int) { return maxFind << 10, maxFind * 8 }

// What is asked for bounds the answer.
func (r *findReply) bounds() (bytes, elements int) {
	tasks, names, referrers := len(r.to.Tasks), len(r.to.Names), len(r.to.Referrers)
	if r.to.Follow {
		tasks += maxFollowed
	}
	bytes = 4<<10 + tasks*(maxPieces/6+64<<10) + names<<10 + referrers*maxReferrers*256
	return min(bytes, maxJSON), 16 + tasks*taskElements + names*nameElements + referrers*(maxReferrers+4)
}

func (*deletesRequest) bounds() (bytes, elements int) { return maxDeletes << 11, maxDeletes * 64 }
func (*deletesReply) bounds() (bytes, elements int)   { return maxDeletes << 11, maxDeletes * 64 }
func (*deletesResult) bounds() (bytes, elements int)  { return maxDeletes << 11, maxDeletes * 16 }

// hints are those that go before a piece.
type hints []hint

func (*hints) bounds() (bytes, elements int) { return maxHintBytes, maxHints * hintElements }

// hello is what a peer says of itself.
type hello struct {
	ID    string   `json:"id"`
	Addrs []string `json:"addrs"` // libp2p multiaddrs
	// host:port where it takes connections for pieces; an unspecified host stands for any of Addrs
	Pieces  []string `json:"pieces"`
	Plain   bool     `json:"plain"` // those are not encrypted
	Mode    Mode     `json:"mode"`
	Version string   `json:"version"`

	// What the first daemons did not tell.
	Protocol       int       `json:"protocol,omitempty"`       // of what peers say; 0: 1
	OldestProtocol int       `json:"oldestProtocol,omitempty"` // that it understands; 0: 1
	Clock          time.Time `json:"clock,omitzero"`           // what time it has
	Instance       string    `json:"instance,omitempty"`       // which run of it this is
	// where a peer with the identity of the one that asks was seen, too
	Twin string `json:"twin,omitempty"`

	date string // of the HTTP answer
}

type taskRef struct {
	Tag    string        `json:"tag"`
	Digest digest.Digest `json:"digest"`
}

type nameRef struct {
	Tag  string `json:"tag"`
	Name string `json:"name"`
}

func (n nameRef) String() string {
	if n.Tag == "" {
		return n.Name
	}
	return n.Name + " under tag " + n.Tag
}

// findRequest asks what a peer has.
type findRequest struct {
	Tasks     []taskRef `json:"tasks,omitempty"`
	Names     []nameRef `json:"names,omitempty"`
	Referrers []taskRef `json:"referrers,omitempty"` // what refers to these, or has them as subject
	// a client is told of the tasks: they are to stay for as long as an upload may take
	Lease bool `json:"lease,omitempty"`
	// tell also of what the names stand for, and of what that refers to
	Follow bool `json:"follow,omitempty"`
}

// findReply answers in the order of the request.
type findReply struct {
	Tasks     []*taskState      `json:"tasks,omitempty"` // null for what it does not have
	Names     []*nameState      `json:"names,omitempty"`
	Referrers [][]digest.Digest `json:"referrers,omitempty"`
	// Followed is what the peer has, up to maxFollowed tasks, of what the names lead to. Of what it
	// does not have, and of what there is no room for, nothing is said: an earlier peer says nothing at all.
	Followed []followed `json:"followed,omitempty"`

	Twin string `json:"twin,omitempty"` // as of hello

	to findRequest // what it answers
}

// check refuses what is no answer to the request.
func (r *findReply) check() error {
	if len(r.Tasks) != len(r.to.Tasks) || len(r.Names) != len(r.to.Names) || len(r.Referrers) != len(r.to.Referrers) ||
		len(r.Followed) > maxFollowed {
		return fmt.Errorf("%w: an answer to something else", errMessage)
	}
	for _, t := range r.Tasks {
		if t != nil {
			if err := t.check(); err != nil {
				return err
			}
		}
	}
	for _, n := range r.Names {
		if n != nil {
			if err := n.check(); err != nil {
				return err
			}
		}
	}
	for _, list := range r.Referrers {
		if len(list) > maxReferrers {
			return fmt.Errorf("%w: more than %d referrers", errMessage, maxReferrers)
		}
		for _, d := range list {
			if _, err := digest.Parse(string(d)); err != nil {
				return fmt.Errorf("%w: %w", errMessage, err)
			}
		}
	}
	for i := range r.Followed {
		f := &r.Followed[i]
		if err := p2p.Task(f.taskRef).Validate(); err != nil {
			return fmt.Errorf("%w: %w", errMessage, err)
		}
		if err := f.State.check(); err != nil {
			return err
		}
	}
	return nil
}

// followed is a task that a name leads to.
type followed struct {
	taskRef
	State taskState `json:"state"`
}

// taskState is what a peer has of a task.
type taskState struct {
	Size      int64     `json:"size"`
	Held      []byte    `json:"held,omitempty"` // set of pieces; empty: all
	MediaType string    `json:"mediaType,omitempty"`
	Manifest  bool      `json:"manifest,omitempty"`
	Pinned    bool      `json:"pinned,omitempty"`
	Origin    time.Time `json:"origin"`
	After     time.Time `json:"after,omitzero"`     // pieces.Version.After of it
	Referred  bool      `json:"referred,omitempty"` // another task refers to it there
	Lacks     bool      `json:"lacks,omitempty"`    // a manifest that has lost a part there
	Hints     []hint    `json:"hints,omitempty"`    // other peers that have it, or a part of it
}

// bytes returns about how many it takes in memory.
func (t *taskState) bytes() int {
	n := 256 + len(t.MediaType) + len(t.Held)
	for _, h := range t.Hints {
		n += len(h.ID)
		for _, a := range h.Addrs {
			n += 32 + len(a)
		}
	}
	return n
}

// whole reports whether the peer has all of it.
func (t *taskState) whole() bool { return len(t.Held) == 0 }

// check refuses what can't be, and drops hints that are too many. It makes no set: a size
// of a few digits can have a large one.
func (t *taskState) check() error {
	n, err := pieceCount(t.Size)
	if err == nil && !t.whole() {
		_, err = schedule.ParseSet(n, t.Held)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errMessage, err)
	}
	t.Hints = t.Hints[:min(len(t.Hints), maxHints)]
	return checkVersions(pieces.Version{At: t.Origin, After: t.After})
}

// pieces returns the set of pieces that the peer has.
func (t *taskState) pieces() (*schedule.Set, error) {
	n, err := pieceCount(t.Size)
	if err != nil {
		return nil, err
	}
	if t.whole() {
		return schedule.FullSet(n), nil
	}
	return schedule.ParseSet(n, t.Held)
}

// nameState is what a peer knows of a name.
type nameState struct {
	Digest  digest.Digest `json:"digest,omitempty"` // empty: it only knows that it was deleted
	Updated time.Time     `json:"updated"`
	After   time.Time     `json:"after,omitzero"`  // pieces.Version.After of it
	LetGo   bool          `json:"letGo,omitempty"` // the host that pointed it there let go of what it stood for before
	Deleted time.Time     `json:"deleted"`         // zero: not that it knows
	// DeletedAfter is pieces.Version.After of the delete.
	DeletedAfter time.Time `json:"deletedAfter,omitzero"`
	DeletedAge   int64     `json:"deletedAge,omitempty"` // seconds since it was made
}

// check refuses what can't be.
func (n *nameState) check() error {
	if err := checkVersions(n.version(), n.deleted()); err != nil {
		return err
	}
	if n.DeletedAge < 0 || n.DeletedAge > maxAge {
		return fmt.Errorf("%w: a delete %d seconds ago", errMessage, n.DeletedAge)
	}
	if n.Digest == "" {
		return nil
	}
	if _, err := digest.Parse(string(n.Digest)); err != nil {
		return fmt.Errorf("%w: %w", errMessage, err)
	}
	if n.Updated.IsZero() {
		return fmt.Errorf("%w: a name without a date", errMessage)
	}
	return nil
}

// version returns when the name was moved.
func (n *nameState) version() pieces.Version { return pieces.Version{At: n.Updated, After: n.After} }

// deleted returns what was deleted.
func (n *nameState) deleted() pieces.Version {
	return pieces.Version{At: n.Deleted, After: n.DeletedAfter}
}

// gone returns the delete that is told of; limit is the one of now.
func (n *nameState) gone(limit time.Time) pieces.Delete {
	return pieces.Delete{At: n.Deleted, After: n.DeletedAfter,
		Limit: limit.Add(-time.Duration(n.DeletedAge) * time.Second)}
}

// checkStamps refuses dates that are none. They order imports, moves and deletes, and
// are mostly, but not only, what the clock of some host has said.
func checkStamps(all ...time.Time) error {
	for _, t := range all {
		if t.After(pieces.LastStamp) || !t.IsZero() && t.Before(firstStamp) {
			return fmt.Errorf("%w: the date %s", errMessage, t)
		}
	}
	return nil
}

// checkVersions refuses versions that there can't be: what is dated before what it came
// after could never be outdone, or deleted, in order.
func checkVersions(all ...pieces.Version) error {
	for _, v := range all {
		if v.After.After(v.At) {
			return fmt.Errorf("%w: what is dated %s came after %s", errMessage, v.At, v.After)
		}
		if err := checkStamps(v.At, v.After); err != nil {
			return err
		}
	}
	return nil
}

// firstStamp is what a version has after which nothing was known.
var firstStamp = time.Unix(0, 0)

// hint says where a peer may be found.
type hint struct {
	ID    string   `json:"id"`
	Addrs []string `json:"addrs"`
}

func hintOf(p peer.AddrInfo) hint {
	h := hint{ID: p.ID.String()}
	for _, a := range p.Addrs {
		if len(h.Addrs) < maxHintAddrs/2 {
			h.Addrs = append(h.Addrs, a.String())
		}
	}
	return h
}

// addrInfo returns what a hint says.
func (h hint) addrInfo() (peer.AddrInfo, error) {
	id, err := peer.Decode(h.ID)
	if err != nil {
		return peer.AddrInfo{}, fmt.Errorf("%w: peer %q: %w", errMessage, h.ID, err)
	}
	info := peer.AddrInfo{ID: id}
	for _, s := range h.Addrs[:min(len(h.Addrs), maxHintAddrs)] {
		if a, err := parseAddr(s); err == nil {
			info.Addrs = append(info.Addrs, a)
		}
	}
	return info, nil
}

// deleteMessage is a delete as peers tell it.
type deleteMessage struct {
	Tag      string      `json:"tag"`
	CID      string      `json:"cid"`
	All      bool        `json:"all,omitempty"` // of the tag, without a cid
	At       time.Time   `json:"at"`
	After    time.Time   `json:"after,omitzero"` // zero: At
	Age      int64       `json:"age,omitempty"`  // seconds since it was made
	Seen     []time.Time `json:"seen,omitempty"` // pieces.Delete.Seen
	Force    bool        `json:"force,omitempty"`
	NameOnly bool        `json:"nameOnly,omitempty"`
	Soft     bool        `json:"soft,omitempty"`
}

// deleteMessageOf returns the message of a delete, at the time now.
func deleteMessageOf(d pieces.Delete, now time.Time) deleteMessage {
	age := min(max(0, int64(now.Sub(d.Made)/time.Second)), maxAge)
	return deleteMessage{d.Tag, d.CID.String(), d.All, d.At, d.After, age, d.Seen, d.Force, d.NameOnly, d.Soft}
}

// parse returns the delete of a message that came at the time now.
//
//nolint:cyclop // a list of rules
func (m deleteMessage) parse(now time.Time) (pieces.Delete, error) {
	if err := p2p.ValidateTag(m.Tag); err != nil {
		return pieces.Delete{}, err
	}
	var cid digest.CID
	if !m.All || m.CID != "" {
		var err error
		if cid, err = digest.ParseCID(m.CID); err != nil {
			return pieces.Delete{}, err
		}
	}
	if m.All && (m.CID != "" || m.Soft || m.NameOnly) {
		return pieces.Delete{}, fmt.Errorf("%w: delete of all, and of %s", errMessage, cid)
	}
	if m.Soft && cid.Digest() == "" || m.NameOnly && cid.CacheID() == "" {
		return pieces.Delete{}, fmt.Errorf("%w: delete of %s", errMessage, cid)
	}
	if m.At.IsZero() || m.Age < 0 || m.Age > maxAge || len(m.Seen) > pieces.MaxSeen {
		return pieces.Delete{}, fmt.Errorf("%w: delete of %s at %s, %d seconds ago", errMessage, cid, m.At, m.Age)
	}
	if err := cmp.Or(checkVersions(pieces.Version{At: m.At, After: m.After}), checkStamps(m.Seen...)); err != nil {
		return pieces.Delete{}, fmt.Errorf("delete of %s: %w", cid, err)
	}
	made := now.Add(-time.Duration(m.Age) * time.Second)
	if m.After.IsZero() && m.Age == 0 && m.At.Before(now) { // by a peer that tells nothing else
		made = m.At
	}
	return pieces.Delete{
		Tag: m.Tag, CID: cid, All: m.All, At: m.At, After: m.After, Seen: m.Seen, Made: made,
		Force: m.Force, NameOnly: m.NameOnly, Soft: m.Soft,
	}, nil
}

// maxAge is the most that a delete can be old, in seconds.
const maxAge = 100 * 365 * 24 * 60 * 60

type deletesRequest struct {
	Deletes []deleteMessage `json:"deletes"`
}

// deletesResult answers in the order of the request.
type deletesResult struct {
	Results []deleteResult `json:"results"`
}

type deleteResult struct {
	Found   bool   `json:"found"`             // there was something of that name
	Removed int    `json:"removed"`           // tasks
	Refused string `json:"refused,omitempty"` // why it was not done
	// Newer, and NewerAfter, is the version that is there and that the delete does not cover.
	Newer      time.Time `json:"newer,omitzero"`
	NewerAfter time.Time `json:"newerAfter,omitzero"`
}

// deletesReply is a part of what a peer knows of deletes.
type deletesReply struct {
	Same    bool            `json:"same"` // as much as the asker
	Deletes []deleteMessage `json:"deletes"`
	Next    uint64          `json:"next"` // to go on after; 0 at the end
}

// decodeJSON reads one JSON message. Unknown fields are ignored: a later version may have more.
func decodeJSON(b []byte, m message) error {
	_, elements := m.bounds()
	if err := jsonlimit.Unmarshal(b, m, elements); err != nil {
		return fmt.Errorf("%w: %w", errMessage, err)
	}
	return nil
}

const (
	// shortMessage is up to how many bytes of a message are taken in at any time.
	shortMessage = 16 << 10
	// inboxRoom is how many bytes longer ones may have together, in each direction.
	inboxRoom = 4 * maxJSON
)

// inbox takes in messages. Of those that are longer than most, only so many are there at
// once that they fit into its room: others wait.
type inbox struct{ room *semaphore.Weighted }

func newInbox() *inbox { return &inbox{semaphore.NewWeighted(inboxRoom)} }

// read reads a message of up to limit bytes. The caller calls done when neither the
// bytes nor what was made of them is needed any more.
func (in *inbox) read(ctx context.Context, r io.Reader, limit int) (b []byte, done func(), err error) {
	done = func() {}
	b, err = io.ReadAll(io.LimitReader(r, int64(min(limit, shortMessage)+1)))
	if err != nil || len(b) <= min(limit, shortMessage) {
		return b, done, err
	}
	if len(b) <= limit {
		if err := in.room.Acquire(ctx, int64(limit)); err != nil {
			return nil, done, err
		}
		done = sync.OnceFunc(func() { in.room.Release(int64(limit)) })
		long := bytes.NewBuffer(b)
		_, err = long.ReadFrom(io.LimitReader(r, int64(limit+1-len(b))))
		b = long.Bytes()
	}
	if err == nil && len(b) > limit {
		err = fmt.Errorf("%w: it is longer than %d bytes", errMessage, limit)
	}
	if err != nil {
		done()
	}
	return b, done, err
}

// pieceCount returns the number of pieces of a blob, as far as one can be
// that a peer tells of.
func pieceCount(size int64) (int, error) {
	if size < 0 || size > maxPieces*digest.MaxPieceLength {
		return 0, fmt.Errorf("%w: a blob of %d bytes", errMessage, size)
	}
	t := digest.Table{Size: size, PieceLength: digest.PieceLength(size)}
	return t.Pieces(), nil
}

// linksHash names a size and a hash chain: peers that mean the same blob have the same.
type linksHash [32]byte

// pieceRequest asks for one piece, any of those that are wanted.
type pieceRequest struct {
	links linksHash
	news  bool // wait until there is one of those that are wanted, and send none
	want  *schedule.Set
}

const (
	pieceVersion = 1

	flagNews  = 1 // of a request
	flagWhole = 1 // of a reply: all pieces are there
	flagPiece = 2 // of a reply: a piece follows

	pieceRequestHeader = 1 + 1 + len(linksHash{}) + 4
	pieceReplyHeader   = 1 + 1 + 4 + 4 + 4
)

func (r *pieceRequest) append(b []byte) []byte {
	flags := byte(0)
	if r.news {
		flags = flagNews
	}
	b = append(b, pieceVersion, flags)
	b = append(b, r.links[:]...)
	b = binary.BigEndian.AppendUint32(b, uint32(r.want.Len()))
	b, _ = r.want.AppendBinary(b) // it never fails
	return b
}

// parsePieceRequest parses what pieceRequest.append made.
func parsePieceRequest(b []byte) (*pieceRequest, error) {
	if len(b) < pieceRequestHeader || b[0] != pieceVersion {
		return nil, fmt.Errorf("%w: not a request for pieces of version %d", errMessage, pieceVersion)
	}
	r := &pieceRequest{news: b[1]&flagNews != 0}
	copy(r.links[:], b[2:])
	n := binary.BigEndian.Uint32(b[pieceRequestHeader-4:])
	if n > maxPieces {
		return nil, fmt.Errorf("%w: %d pieces", errMessage, n)
	}
	var err error
	if r.want, err = schedule.ParseSet(int(n), b[pieceRequestHeader:]); err != nil {
		return nil, fmt.Errorf("%w: %w", errMessage, err)
	}
	return r, nil
}

// pieceReply stands before a piece.
type pieceReply struct {
	piece int           // -1: none follows
	have  *schedule.Set // what the peer has
	hints hints         // other peers that ask for the blob
}

func (r *pieceReply) append(b []byte) ([]byte, error) {
	var flags byte
	var have, hints []byte
	if r.have.Full() {
		flags |= flagWhole
	} else {
		have, _ = r.have.AppendBinary(nil) // it never fails
	}
	if r.piece >= 0 {
		flags |= flagPiece
	}
	if len(r.hints) > 0 {
		var err error
		if hints, err = json.Marshal(r.hints); err != nil {
			return nil, err
		}
	}
	b = append(b, pieceVersion, flags)
	b = binary.BigEndian.AppendUint32(b, uint32(max(r.piece, 0)))
	b = binary.BigEndian.AppendUint32(b, uint32(len(have)))
	b = binary.BigEndian.AppendUint32(b, uint32(len(hints)))
	b = append(b, have...)
	return append(b, hints...), nil
}

// maxHintBytes bounds the hints of one reply.
const maxHintBytes = 64 << 10

// readPieceReply reads what pieceReply.append made, about a blob of n pieces.
func readPieceReply(r io.Reader, n int) (*pieceReply, error) {
	var header [pieceReplyHeader]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return nil, err
	}
	if header[0] != pieceVersion {
		return nil, fmt.Errorf("%w: answer of version %d", errMessage, header[0])
	}
	flags := header[1]
	reply := &pieceReply{piece: -1}
	if flags&flagPiece != 0 {
		piece := binary.BigEndian.Uint32(header[2:])
		if int64(piece) >= int64(n) {
			return nil, fmt.Errorf("%w: piece %d of %d", errMessage, piece, n)
		}
		reply.piece = int(piece)
	}
	haveSize, hintSize := binary.BigEndian.Uint32(header[6:]), binary.BigEndian.Uint32(header[10:])
	if int64(haveSize) > int64(n+7)/8 || hintSize > maxHintBytes {
		return nil, fmt.Errorf("%w: header of %d and %d bytes", errMessage, haveSize, hintSize)
	}
	tail := make([]byte, haveSize+hintSize)
	if _, err := io.ReadFull(r, tail); err != nil {
		return nil, err
	}
	var err error
	if flags&flagWhole != 0 {
		reply.have = schedule.FullSet(n)
	} else if reply.have, err = schedule.ParseSet(n, tail[:haveSize]); err != nil {
		return nil, fmt.Errorf("%w: %w", errMessage, err)
	}
	if hintSize > 0 {
		if err := decodeJSON(tail[haveSize:], &reply.hints); err != nil {
			return nil, err
		}
		reply.hints = reply.hints[:min(len(reply.hints), maxHints)]
	}
	return reply, nil
}

// links is the size of a blob and the hash chain of its pieces.
type links struct {
	size  int64
	chain []byte
}

func (l links) hash(d digest.Digest) linksHash {
	b := fmt.Appendf(nil, "dfcache links\x00%s\x00%d\x00", d, l.size)
	return linksHash(sha256Sum(b, l.chain))
}

// append returns the form in which links are sent: the size in 8 bytes, big-endian, and the chain.
func (l links) append(b []byte) []byte {
	return append(binary.BigEndian.AppendUint64(b, uint64(l.size)), l.chain...)
}

// readLinks reads what links.append made, of the blob d.
func readLinks(r io.Reader, d digest.Digest) (links, error) {
	var header [8]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return links{}, err
	}
	l := links{size: int64(binary.BigEndian.Uint64(header[:]))}
	if _, err := pieceCount(l.size); err != nil {
		return links{}, err
	}
	// The chain is read before there is room for all of it: a size that is a
	// lie costs its sender the bytes.
	want := digest.ChainSize(d.Algorithm(), l.size)
	chain, err := io.ReadAll(io.LimitReader(r, int64(want)+1))
	if err != nil {
		return links{}, err
	}
	if len(chain) != want {
		return links{}, fmt.Errorf("%w: a hash chain of %d bytes for a blob of %d", errMessage, len(chain), l.size)
	}
	l.chain = chain
	return l, nil
}
