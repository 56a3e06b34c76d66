package digest_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"syscall"
	"testing"

	"github.com/dfcache/dfcache/digest"
)

// unreadable is content of which the disk gives nothing from some offset on.
type unreadable struct {
	*bytes.Reader
	from int64
	err  error
}

func (u unreadable) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > u.from {
		return 0, &fs.PathError{Op: "read", Path: "blob", Err: u.err}
	}
	return u.Reader.ReadAt(p, off)
}

// What the disk can't give is damage of that piece; any other failure is none.
func TestUnreadableIsDamage(t *testing.T) {
	r := digest.NewRecorder(digest.SHA256)
	data := bytes.Repeat([]byte("x"), 3*digest.MinPieceLength)
	if _, err := r.Write(data); err != nil {
		t.Fatal(err)
	}
	table, err := r.Table()
	if err != nil {
		t.Fatal(err)
	}
	for cause, damaged := range map[error]bool{syscall.EIO: true, syscall.EUCLEAN: true, syscall.ENOMEM: false} {
		v := digest.NewVerified(unreadable{
			bytes.NewReader(data), 2 * digest.MinPieceLength, fmt.Errorf("sector 7: %w", cause)}, table)
		_, readErr := v.ReadAt(make([]byte, 100), 2*digest.MinPieceLength)
		for what, err := range map[string]error{
			"ReadAt":    readErr,
			"CopyRange": v.CopyRange(t.Context(), io.Discard, 0, v.Size(), nil),
		} {
			corrupt, ok := errors.AsType[*digest.CorruptError](err)
			if ok != damaged || ok && corrupt.Piece != 2 || err == nil {
				t.Errorf("%s, %v: %v; want damage: %v", what, cause, err, damaged)
			}
		}
	}
}
