package swarm

import (
	"bytes"
	"encoding/json"
	"testing"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
)

func FuzzPieceRequest(f *testing.F) {
	want := schedule.NewSet(20)
	want.Add(3)
	f.Add((&pieceRequest{links: linksHash{1}, want: want}).append(nil))
	f.Add((&pieceRequest{news: true, want: schedule.FullSet(300)}).append(nil))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parsePieceRequest(b)
		if err != nil {
			return
		}
		again, err := parsePieceRequest(r.append(nil))
		if err != nil || again.links != r.links || again.news != r.news || !again.want.Equal(r.want) {
			t.Errorf("%+v is %+v, %v when it is sent on", r, again, err)
		}
	})
}

func FuzzPieceReply(f *testing.F) {
	part := schedule.NewSet(300)
	part.Add(299)
	for _, r := range []pieceReply{
		{piece: -1, have: schedule.NewSet(300)},
		{piece: 7, have: schedule.FullSet(300)},
		{piece: 0, have: part, hints: []hint{{"12D3KooW", []string{"/ip4/127.0.0.1/tcp/1"}}}},
	} {
		b, err := r.append(nil)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, 300)
	}
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		if n < 0 || n > 100_000 {
			return
		}
		r, err := readPieceReply(bytes.NewReader(b), n)
		if err != nil {
			return
		}
		if r.piece >= n || r.have.Len() != n || len(r.hints) > maxHints {
			t.Errorf("out of bounds: %+v", r)
		}
		for _, h := range r.hints {
			h.addrInfo()
		}
	})
}

func FuzzLinks(f *testing.F) {
	d := digest.SHA256.FromString("")
	f.Add(links{0, nil}.append(nil))
	f.Add(links{digest.MinPieceLength + 1, make([]byte, 32)}.append(nil))
	f.Add(links{1 << 60, nil}.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := readLinks(bytes.NewReader(b), d)
		if err != nil {
			return
		}
		if !bytes.Equal(l.append(nil), b) {
			t.Errorf("%x is read as %+v", b, l)
		}
	})
}

// FuzzAnswers has everything parsed that a peer may say as JSON.
func FuzzAnswers(f *testing.F) {
	for _, v := range []any{
		findReply{Tasks: []*taskState{{Size: 100_000, Held: []byte{1}}, nil},
			Names: []*nameState{{Digest: digest.SHA256.FromString("")}}},
		deletesReply{Deletes: []deleteMessage{{Tag: "t", CID: "v1", At: time.Unix(1, 0)}}},
		hello{ID: "x", Pieces: []string{"0.0.0.0:1"}},
	} {
		b, err := json.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		reply := findReply{to: findRequest{Tasks: make([]taskRef, 2), Names: make([]nameRef, 2)}}
		if decodeJSON(b, &reply) == nil {
			for _, s := range reply.Tasks {
				if s == nil {
					continue
				}
				if set, err := s.pieces(); err == nil && s.Size < 1<<30 &&
					(set.Len()+1)*digest.MaxPieceLength < int(s.Size) {
					t.Errorf("%d bytes have %d pieces", s.Size, set.Len())
				}
				for _, h := range s.Hints {
					h.addrInfo()
				}
			}
		}
		var deletes deletesReply
		if decodeJSON(b, &deletes) == nil {
			for _, m := range deletes.Deletes {
				if d, err := m.parse(time.Now()); err == nil && (d.At.IsZero() || d.CID.String() == "") {
					t.Errorf("%+v is taken for a delete", m)
				}
			}
		}
		var h hello
		if decodeJSON(b, &h) == nil {
			info, err := hint{h.ID, h.Addrs}.addrInfo()
			if err == nil && len(directAddresses(&h, info)) > 8 {
				t.Error("too many addresses")
			}
		}
	})
}
